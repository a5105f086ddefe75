// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * Interface v1: the migration region. struct vfio_device_migration_info at its start, the data section behind it.
 *
 * The fields take their own width and alignment only. What is written to the reserved bits of device_state is kept, and they do
 * not start as zero, so that a user who does not read, change and write them is found out. The section gets the same stream as
 * the data files of v2, a chunk at a time. Reading data_offset is the read, writing data_size the write; of the knobs that
 * disturb them short_reads, fail_read, fail_write and block have an effect here. A mapped section is plain memory: what user
 * space does to it while a chunk is out is its own affair.
 */
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "airlift.h"

#define V1_RUNNING VFIO_DEVICE_STATE_V1_RUNNING
#define V1_SAVING VFIO_DEVICE_STATE_V1_SAVING
#define V1_RESUMING VFIO_DEVICE_STATE_V1_RESUMING
#define V1_MASK ((u32)VFIO_DEVICE_STATE_MASK)
#define V1_RESERVED 0xa1170050U		/* how the reserved bits start */

static u32 airlift_v1_state(const struct airlift_dev *dev)
{
	return dev->v1.device_state & V1_MASK;
}

/* dev->state shows the three bits here. Under state_mutex. */
static void airlift_v1_enter(struct airlift_dev *dev, u32 state)
{
	bool runs = state & V1_RUNNING;

	dev->v1.device_state = (dev->v1.device_state & ~V1_MASK) | state;
	airlift_enter(dev, (enum vfio_device_mig_state)state, runs, runs);
}

/* The session is over, whatever of it is left. */
static void airlift_v1_end(struct airlift_dev *dev)
{
	struct airlift_v1 *v1 = &dev->v1;

	if (v1->save)
		airlift_save_stop(dev, v1->save);
	airlift_save_free(v1->save);
	v1->save = NULL;
	kfree(v1->load);
	v1->load = NULL;
	v1->staged = 0;
	v1->chunk = false;
	v1->done = 0;
}

/* Under state_mutex, or before anybody has the device. */
void airlift_v1_reset(struct airlift_dev *dev)
{
	if (!airlift_is_v1(dev))
		return;
	airlift_v1_end(dev);
	dev->v1.device_state = V1_RESERVED;
	airlift_v1_enter(dev, V1_RUNNING);
}

/* The first open: under io_lock, so that the knobs hold still. */
int airlift_v1_open(struct airlift_dev *dev)
{
	struct airlift_v1 *v1 = &dev->v1;

	v1->section = vmalloc_user(PAGE_ALIGN(v1->section_size));
	if (!v1->section)
		return -ENOMEM;
	v1->data_offset = dev->v1_map == AIRLIFT_TRAPPED ? sizeof(struct vfio_device_migration_info) : PAGE_SIZE;
	return 0;
}

/* The last close. Under state_mutex. */
void airlift_v1_close(struct airlift_dev *dev)
{
	if (!airlift_is_v1(dev))
		return;
	if (!dev->reset_on_close) {
		u32 state = airlift_v1_state(dev);

		airlift_v1_end(dev);
		if (state == V1_RESUMING)
			airlift_v1_enter(dev, V1_SAVING | V1_RESUMING);
		else if (state & V1_SAVING && !(state & V1_RESUMING))
			airlift_v1_enter(dev, state & ~V1_SAVING);
	}
	vfree(dev->v1.section);
	dev->v1.section = NULL;
}

/* The areas of the section that can be mapped, as offsets into it; deliberately not sorted. Says how many. */
static u32 airlift_v1_areas(const struct airlift_dev *dev, struct vfio_region_sparse_mmap_area *areas)
{
	u64 quarter = round_down(dev->v1.section_size / 4, PAGE_SIZE);

	switch (dev->v1_map) {
	case AIRLIFT_MAPPED:
		areas[0].offset = 0;
		areas[0].size = dev->v1.section_size;
		return 1;
	case AIRLIFT_SPARSE:
		/* The second quarter and the fourth; between and before them is trapped. */
		areas[0].offset = 3 * quarter;
		areas[0].size = quarter;
		areas[1].offset = quarter;
		areas[1].size = quarter;
		return 2;
	default:
		return 0;
	}
}

int airlift_v1_region_info(struct airlift_dev *dev, struct vfio_region_info *info, struct vfio_info_cap *caps)
{
	struct vfio_region_info_cap_type type = {
		.header.id = VFIO_REGION_INFO_CAP_TYPE,
		.header.version = 1,
		.type = VFIO_REGION_TYPE_MIGRATION_DEPRECATED,
		.subtype = VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED,
	};
	struct vfio_region_info_cap_sparse_mmap *sparse;
	struct vfio_region_sparse_mmap_area areas[2];
	u32 count = airlift_v1_areas(dev, areas), i;
	int ret;

	info->size = dev->v1.data_offset + dev->v1.section_size;
	info->flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
	ret = vfio_info_add_capability(caps, &type.header, sizeof(type));
	if (ret || !count)
		return ret;
	info->flags |= VFIO_REGION_INFO_FLAG_MMAP;
	sparse = kzalloc(struct_size(sparse, areas, count), GFP_KERNEL);
	if (!sparse)
		return -ENOMEM;
	sparse->header.id = VFIO_REGION_INFO_CAP_SPARSE_MMAP;
	sparse->header.version = 1;
	sparse->nr_areas = count;
	for (i = 0; i < count; i++) {
		sparse->areas[i].offset = dev->v1.data_offset + areas[i].offset;
		sparse->areas[i].size = areas[i].size;
	}
	ret = vfio_info_add_capability(caps, &sparse->header, struct_size(sparse, areas, count));
	kfree(sparse);
	return ret;
}

/* What can be mapped is fixed while the device is open, so this takes no lock. */
int airlift_v1_mmap(struct airlift_dev *dev, struct vm_area_struct *vma)
{
	u64 first = vma->vm_pgoff & ((1UL << (AIRLIFT_INDEX_SHIFT - PAGE_SHIFT)) - 1);
	u64 index = vma->vm_pgoff >> (AIRLIFT_INDEX_SHIFT - PAGE_SHIFT);
	struct vfio_region_sparse_mmap_area areas[2];
	u64 length = vma->vm_end - vma->vm_start;
	u32 count = airlift_v1_areas(dev, areas), i;
	u64 offset = first << PAGE_SHIFT;

	if (index != AIRLIFT_V1_REGION || !(vma->vm_flags & VM_SHARED) || offset < dev->v1.data_offset)
		return -EINVAL;
	offset -= dev->v1.data_offset;
	for (i = 0; i < count; i++)
		if (offset >= areas[i].offset && length <= areas[i].size && offset - areas[i].offset <= areas[i].size - length)
			return remap_vmalloc_range(vma, dev->v1.section, offset >> PAGE_SHIFT);
	return -EINVAL;
}

/* Whether there is such a step at all. */
static bool airlift_v1_arc(u32 from, u32 to)
{
	switch (to) {
	case 0:
	case V1_RUNNING:
	case V1_SAVING:
		return true;
	case V1_RUNNING | V1_SAVING:
		return from == V1_RUNNING;
	case V1_RESUMING:
		return from == V1_RUNNING || from == 0;
	default:
		return false;
	}
}

/* A write to device_state. In ERROR everything is refused; only a reset leads out. */
static int airlift_v1_set_state(struct airlift_dev *dev, u32 value)
{
	u32 from = airlift_v1_state(dev), to = value & V1_MASK;
	struct airlift_v1 *v1 = &dev->v1;
	struct airlift_save *save = NULL;
	struct airlift_load *load = NULL;
	bool error;
	int ret;

	if (from == (V1_SAVING | V1_RESUMING))
		return -EIO;
	if (to != from && !airlift_v1_arc(from, to))
		return -EINVAL;
	if (to == from) {
		v1->device_state = value;
		return 0;
	}
	dev_dbg(dev->vdev.dev, "%u -> %u\n", from, to);
	ret = airlift_block_here(dev, AIRLIFT_BLOCK_ARC, from, to, false, NULL);
	if (ret)
		return ret;
	ret = airlift_fail_arc(dev, from, to, &error);
	if (ret) {
		if (error) {
			airlift_v1_end(dev);
			airlift_v1_enter(dev, V1_SAVING | V1_RESUMING);
		}
		return ret;
	}

	if (from == V1_RESUMING) {
		ret = airlift_load_finish(dev, v1->load);
		if (ret)
			return ret;
	}
	if (to == V1_RESUMING) {
		load = kzalloc(sizeof(*load), GFP_KERNEL_ACCOUNT);
		if (!load)
			return -ENOMEM;
		airlift_clear_state(dev);
	} else if ((to & V1_SAVING) && !v1->save) {
		save = airlift_save_start(dev, false);
		if (IS_ERR(save))
			return PTR_ERR(save);
	}
	/* From here on nothing fails. Pre-copy and stop-and-copy are one session; all others end. */
	if (!v1->save || !(to & V1_SAVING)) {
		airlift_v1_end(dev);
		v1->save = save;
		v1->load = load;
	}
	v1->device_state = value;
	airlift_v1_enter(dev, to);
	if (to == V1_SAVING)
		airlift_save_stopped(dev, v1->save);
	return 0;
}

/* Reading pending_bytes after data_offset says that the chunk was taken. */
static u64 airlift_v1_pending(struct airlift_dev *dev)
{
	struct airlift_v1 *v1 = &dev->v1;
	u64 initial, dirty, trailer;

	if (!v1->save)
		return 0;
	if (v1->chunk) {
		v1->chunk = false;
		v1->staged = 0;
	}
	airlift_save_left(dev, v1->save, &initial, &dirty, &trailer);
	return initial + dirty + (v1->save->stopped ? trailer : 0);
}

/* Reading data_offset makes the next chunk, unless there is one already. */
static int airlift_v1_stage(struct airlift_dev *dev)
{
	u64 short_reads = READ_ONCE(dev->short_reads);
	struct airlift_v1 *v1 = &dev->v1;
	size_t most = v1->section_size, n;
	const void *from;
	int ret;

	if (!v1->save || v1->chunk)
		return 0;
	ret = airlift_block_here(dev, AIRLIFT_BLOCK_READ, 0, 0, false, NULL);
	if (ret)
		return ret;
	if (short_reads)
		most = min_t(u64, most, short_reads);
	ret = airlift_fail_io(dev, false, v1->done, &most);
	if (ret)
		return ret;
	while (v1->staged < most) {
		from = airlift_save_peek(dev, v1->save, &n);
		if (!from)
			break;
		n = min_t(u64, n, most - v1->staged);
		memcpy(v1->section + v1->staged, from, n);
		airlift_save_consume(v1->save, n);
		v1->staged += n;
		cond_resched();
	}
	v1->chunk = true;
	v1->done += v1->staged;
	atomic64_inc(&dev->reads);
	atomic64_add(v1->staged, &dev->bytes_read);
	return 0;
}

/* Writing data_size in RESUMING says that so many bytes are in the section. */
static int airlift_v1_take(struct airlift_dev *dev, u64 size)
{
	struct airlift_v1 *v1 = &dev->v1;
	size_t len = size;
	ssize_t ret;

	if (!v1->load || size > v1->section_size)
		return -EINVAL;
	ret = airlift_block_here(dev, AIRLIFT_BLOCK_WRITE, 0, 0, false, NULL);
	if (ret)
		return ret;
	ret = airlift_fail_io(dev, true, v1->done, &len);
	if (ret)
		return ret;
	if (len < size)
		return -EIO;	/* a transaction is taken as a whole or not at all */
	ret = airlift_load_feed(dev, v1->load, v1->section, len);
	if (ret < 0)
		return ret;
	if (ret < len)
		return -ENOSPC;
	v1->done += len;
	atomic64_add(len, &dev->bytes_written);
	return 0;
}

static int airlift_v1_get_field(struct airlift_dev *dev, u64 offset, u64 *value)
{
	int ret;

	switch (offset) {
	case offsetof(struct vfio_device_migration_info, device_state):
		*value = dev->v1.device_state;
		return 0;
	case offsetof(struct vfio_device_migration_info, pending_bytes):
		*value = airlift_v1_pending(dev);
		return 0;
	case offsetof(struct vfio_device_migration_info, data_offset):
		ret = airlift_v1_stage(dev);
		*value = dev->v1.data_offset;
		return ret;
	case offsetof(struct vfio_device_migration_info, data_size):
		*value = dev->v1.staged;
		return 0;
	default:
		*value = 0;	/* reserved */
		return 0;
	}
}

static int airlift_v1_set_field(struct airlift_dev *dev, u64 offset, u64 value)
{
	switch (offset) {
	case offsetof(struct vfio_device_migration_info, device_state):
		return airlift_v1_set_state(dev, value);
	case offsetof(struct vfio_device_migration_info, data_size):
		return airlift_v1_take(dev, value);
	case offsetof(struct vfio_device_migration_info, reserved):
		return 0;
	default:
		return -EINVAL;	/* read only */
	}
}

static ssize_t airlift_v1_field(struct airlift_dev *dev, char __user *buf, size_t count, u64 offset, bool write)
{
	size_t width = offset < offsetof(struct vfio_device_migration_info, pending_bytes) ? 4 : 8;
	union { u32 narrow; u64 wide; } raw = {};
	u64 value = 0;
	int ret;

	if (count != width || offset % width)
		return -EINVAL;
	if (write) {
		if (copy_from_user(&raw, buf, width))
			return -EFAULT;
		value = width == 4 ? raw.narrow : raw.wide;
	}
	ret = airlift_lock_state(dev);
	if (ret)
		return ret;
	ret = write ? airlift_v1_set_field(dev, offset, value) : airlift_v1_get_field(dev, offset, &value);
	airlift_unlock_state(dev);
	if (ret)
		return ret;
	if (!write) {
		if (width == 4)
			raw.narrow = value;
		else
			raw.wide = value;
		if (copy_to_user(buf, &raw, width))
			return -EFAULT;
	}
	return count;
}

/* A read or a write of the region. The section can be read and written as a whole, whether it is mapped or not. */
ssize_t airlift_v1_access(struct airlift_dev *dev, char __user *buf, size_t count, u64 offset, bool write)
{
	struct airlift_v1 *v1 = &dev->v1;

	if (offset < sizeof(struct vfio_device_migration_info))
		return airlift_v1_field(dev, buf, count, offset, write);
	if (offset < v1->data_offset || offset - v1->data_offset >= v1->section_size)
		return -EINVAL;
	offset -= v1->data_offset;
	count = min_t(u64, count, v1->section_size - offset);
	if (write ? copy_from_user(v1->section + offset, buf, count) : copy_to_user(buf, v1->section + offset, count))
		return -EFAULT;
	return count;
}
