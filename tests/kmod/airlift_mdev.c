// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The test driver: mdev devices that migrate, for tests of what user space does with real VFIO devices.
 *
 * The kernel's own sample with migration has 96 bytes of state, no dirty data, no DMA and no faults. These devices have as much
 * state as a test wants, dirty it while they run, log their DMA, write to each other, speak interface v1 or v2, and fail,
 * wait and misbehave on demand. Nothing here is meant for anything but tests: the knobs let root stall any thread.
 *
 * Parent  /sys/class/mdev_bus/airlift
 * Types   airlift-v2            STOP_COPY, P2P, PRE_COPY
 *         airlift-v2-no-p2p     STOP_COPY, PRE_COPY
 *         airlift-v2-no-precopy STOP_COPY, P2P
 *         airlift-v2-plain      STOP_COPY
 *         airlift-v1            no v2 feature; the migration region of interface v1 at index 9
 *
 * The device: PCI, BAR0 (region 0, `state_size` bytes) is its state, BAR2 its MSI-X table. The state and its size are what the
 * migration stream holds. Config space and MSI-X table are not in it: user space carries them, as with real devices. A write to
 * BAR0 while the device does not run is refused with EIO; DMA does not ask for the bus master bit.
 *
 * Knobs, /sys/bus/mdev/devices/UUID/airlift/. A text that is not understood is EINVAL. N is a number, 0 means off. "" is an
 * empty line: a write of no bytes does not reach a driver.
 *
 *   state_size      bytes, 0 to 1 GiB; EBUSY while the device is open. The state is zeroed
 *   precopy_zero    1: a read that finds nothing in PRE_COPY gives 0 instead of ENOMSG
 *   short_reads N   a read gives at most N bytes (v1: a chunk has at most N)
 *   eagain N        every Nth read waits for about 1 ms first, and with O_NONBLOCK gives EAGAIN until then
 *   eintr N         every Nth read gives EINTR first
 *   reinit          write 1 in PRE_COPY or PRE_COPY_P2P: every page is given again. With MIG_PRECOPY_INFOv2 as initial data,
 *                   and VFIO_PRECOPY_INFO_REINIT is reported once; without it as dirty data. EINVAL in other states
 *   dirty_rate      bytes per second that the device changes by itself while it runs, behind the first page
 *   fail_arc        "FROM TO ERRNO [error]" (states as the kernel numbers them; v1: the three bits): the arc fails; with `error`
 *                   the device goes to ERROR, else it stays in FROM. "" is off
 *   fail_read       "AFTER ERRNO": when AFTER bytes of the session are through, reads fail. "" is off
 *   fail_write      the same for writes
 *   block           "read", "write" or "arc FROM TO", then perhaps "uninterruptible" (only a fatal signal ends it): whoever does
 *                   it waits until the knob changes. A signal gives EINTR and leaves the state as it is. "" is off
 *   blocked         (ro) threads that wait there now
 *   reset_on_close  1 (default): the last close resets the device. 0: state, config space and state memory stay; a data session
 *                   ends as if it was left, RESUMING ends in ERROR
 *   dma             "IOVA LENGTH BYTE": writes BYTE LENGTH times at IOVA. EIO while the device does not run or is not open
 *   log_max_ranges N   DMA_LOGGING_START joins the nearest ranges until there are N, as drivers do whose hardware has N
 *   log_page_size   the page size that DMA_LOGGING_START chooses, a power of two from 4096 to 1 GiB
 *   log_fail        1: DMA_LOGGING_START gives EOPNOTSUPP
 *   interrupt       "INDEX VECTOR": raises it; ENXIO where no eventfd is set, EIO while the device does not run
 *   peer            UUID of another device of this driver, or ""
 *   peer_rate       writes per second to the peer: 1, 2, 3 ... in RUNNING and PRE_COPY. The peer keeps the last in the first 8
 *                   bytes of its state, and the sender its own count in the second 8, so that both migrate
 *   v1_section      bytes of the data section; EBUSY while the device is open. v1 only
 *   v1_map          "trapped", "mapped" or "sparse"; EBUSY while the device is open. v1 only
 *
 *   read only: state (the kernel's number, v1: the three bits), opens, resets (VFIO_DEVICE_RESET, not closes), digest (of the
 *   state), reads (calls), bytes_read, bytes_written, dma_writes (pages), peer_sent, peer_received, peer_lost (writes that came
 *   while this device was stopped, and own writes that found no peer), peer_gaps.
 *
 * VFIO_DEVICE_RESET loses the state: memory zeroed, config space as after creation, RUNNING, the data file gives ENODEV. DMA
 * logging goes on, so that what was written before is still reported. While an arc is under way it takes effect after it.
 *
 * `echo 'module airlift +p' > /sys/kernel/debug/dynamic_debug/control` shows each arc as "airlift UUID: FROM -> TO".
 *
 * For kernels with 64 bits: counters and sizes are read without a lock.
 *
 * This file: the module, its mdev types, and opening, closing and resetting a device.
 */
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "airlift.h"

struct workqueue_struct *airlift_wq;
LIST_HEAD(airlift_devices);
DEFINE_MUTEX(airlift_list_lock);

/* Everything that a reset takes back. Under state_mutex. */
static void airlift_do_reset(struct airlift_dev *dev)
{
	airlift_file_end(dev);
	airlift_v1_reset(dev);
	airlift_clear_state(dev);
	airlift_pci_reset(dev);
	airlift_irq_reset(dev);
	if (!airlift_is_v1(dev))
		airlift_v2_enter(dev, VFIO_DEVICE_STATE_RUNNING);
}

/* Takes state_mutex. A thread that is killed gives up. */
int airlift_lock_state(struct airlift_dev *dev)
{
	return mutex_lock_killable(&dev->state_mutex);
}

/*
 * Gives state_mutex back, and does the resets that came while it was held. Whoever asks for a reset sets the bit and then tries
 * the lock; whoever unlocks looks at the bit after that. One of them sees the other.
 */
void airlift_unlock_state(struct airlift_dev *dev)
{
	do {
		while (test_and_clear_bit(0, &dev->reset_pending))
			airlift_do_reset(dev);
		mutex_unlock(&dev->state_mutex);
		smp_mb();	/* pairs with the one in airlift_reset() */
	} while (test_bit(0, &dev->reset_pending) && mutex_trylock(&dev->state_mutex));
}

static int airlift_reset(struct airlift_dev *dev)
{
	atomic64_inc(&dev->resets);
	set_bit(0, &dev->reset_pending);
	smp_mb__after_atomic();	/* pairs with the one in airlift_unlock_state() */
	if (mutex_trylock(&dev->state_mutex))
		airlift_unlock_state(dev);
	return 0;
}

static int airlift_open(struct vfio_device *vdev)
{
	struct airlift_dev *dev = to_airlift(vdev);
	int ret = 0;

	mutex_lock(&dev->io_lock);
	if (airlift_is_v1(dev))
		ret = airlift_v1_open(dev);
	if (!ret) {
		dev->open = true;
		atomic64_inc(&dev->opens);
	}
	mutex_unlock(&dev->io_lock);
	if (!ret)
		airlift_activity_kick(dev);
	return ret;
}

/* Before this returns, DMA is over and the data file has ended: the core takes the address space away next. */
static void airlift_close(struct vfio_device *vdev)
{
	struct airlift_dev *dev = to_airlift(vdev);

	mutex_lock(&dev->io_lock);
	dev->open = false;
	mutex_unlock(&dev->io_lock);
	cancel_delayed_work_sync(&dev->activity);
	airlift_log_release(dev);

	mutex_lock(&dev->state_mutex);
	airlift_irq_release(dev);
	if (dev->reset_on_close)
		airlift_do_reset(dev);
	else
		airlift_v2_close(dev);
	airlift_v1_close(dev);
	airlift_unlock_state(dev);
}

static long airlift_get_info(struct airlift_dev *dev, void __user *arg)
{
	unsigned long minsz = offsetofend(struct vfio_device_info, num_irqs);
	struct vfio_device_info info;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;
	info.flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
	info.num_regions = VFIO_PCI_NUM_REGIONS + (airlift_is_v1(dev) ? 1 : 0);
	info.num_irqs = VFIO_PCI_NUM_IRQS;
	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

static long airlift_get_irq_info(void __user *arg)
{
	unsigned long minsz = offsetofend(struct vfio_irq_info, count);
	struct vfio_irq_info info;
	int ret;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;
	ret = airlift_irq_info(&info);
	if (ret)
		return ret;
	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

static long airlift_ioctl_set_irqs(struct airlift_dev *dev, void __user *arg)
{
	unsigned long minsz = offsetofend(struct vfio_irq_set, count);
	struct vfio_irq_set hdr;
	void *data = NULL;
	size_t size = 0;
	int ret;

	if (copy_from_user(&hdr, arg, minsz))
		return -EFAULT;
	ret = vfio_set_irqs_validate_and_prepare(&hdr, airlift_irq_count(hdr.index), VFIO_PCI_NUM_IRQS, &size);
	if (ret)
		return ret;
	if (size) {
		data = memdup_user(arg + minsz, size);
		if (IS_ERR(data))
			return PTR_ERR(data);
	}
	ret = airlift_set_irqs(dev, &hdr, data);
	kfree(data);
	return ret;
}

#if !AIRLIFT_REGION_INFO_OP
static long airlift_get_region_info(struct vfio_device *vdev, void __user *arg)
{
	unsigned long minsz = offsetofend(struct vfio_region_info, offset);
	struct vfio_info_cap caps = {};
	struct vfio_region_info info;
	long ret;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;
	info.cap_offset = 0;
	ret = airlift_region_info(vdev, &info, &caps);
	if (ret)
		goto out;
	if (caps.size) {
		info.flags |= VFIO_REGION_INFO_FLAG_CAPS;
		if (info.argsz < sizeof(info) + caps.size) {
			info.argsz = sizeof(info) + caps.size;
		} else {
			vfio_info_cap_shift(&caps, sizeof(info));
			if (copy_to_user(arg + sizeof(info), caps.buf, caps.size)) {
				ret = -EFAULT;
				goto out;
			}
			info.cap_offset = sizeof(info);
		}
	}
	ret = copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
out:
	kfree(caps.buf);
	return ret;
}
#endif

static long airlift_ioctl(struct vfio_device *vdev, unsigned int cmd, unsigned long arg)
{
	struct airlift_dev *dev = to_airlift(vdev);
	void __user *uarg = (void __user *)arg;

	switch (cmd) {
	case VFIO_DEVICE_GET_INFO:
		return airlift_get_info(dev, uarg);
#if !AIRLIFT_REGION_INFO_OP
	case VFIO_DEVICE_GET_REGION_INFO:
		return airlift_get_region_info(vdev, uarg);
#endif
	case VFIO_DEVICE_GET_IRQ_INFO:
		return airlift_get_irq_info(uarg);
	case VFIO_DEVICE_SET_IRQS:
		return airlift_ioctl_set_irqs(dev, uarg);
	case VFIO_DEVICE_RESET:
		return airlift_reset(dev);
	default:
		return -ENOTTY;
	}
}

/* Only the data section of interface v1 is mapped. Under mmap_lock: takes no lock of ours. */
static int airlift_mmap(struct vfio_device *vdev, struct vm_area_struct *vma)
{
	struct airlift_dev *dev = to_airlift(vdev);

	if (!airlift_is_v1(dev))
		return -EINVAL;
	return airlift_v1_mmap(dev, vma);
}

/* What can fail comes first: the core does not call release after a failure here. */
static int airlift_init(struct vfio_device *vdev)
{
	struct airlift_dev *dev = to_airlift(vdev);
	struct mdev_device *mdev = to_mdev_device(vdev->dev);

	dev->mem = airlift_alloc_state(AIRLIFT_DEFAULT_STATE);
	if (!dev->mem)
		return -ENOMEM;
	dev->state_size = AIRLIFT_DEFAULT_STATE;
	dev->type = container_of(mdev->type, struct airlift_type, type);
	INIT_LIST_HEAD(&dev->list);
	init_waitqueue_head(&dev->wait);
	mutex_init(&dev->state_mutex);
	mutex_init(&dev->io_lock);
	mutex_init(&dev->mem_lock);
	mutex_init(&dev->pci_lock);
	spin_lock_init(&dev->knob_lock);
	xa_init(&dev->log.pages);
	INIT_DELAYED_WORK(&dev->activity, airlift_activity);
	dev->reset_on_close = 1;
	dev->log_page_size = AIRLIFT_PAGE;
	dev->v1.section_size = SZ_64K;
	airlift_v1_reset(dev);
	airlift_pci_reset(dev);

	if (!airlift_is_v1(dev)) {
		airlift_enter(dev, VFIO_DEVICE_STATE_RUNNING, true, true);
		vdev->migration_flags = dev->type->migration_flags;
		vdev->mig_ops = &airlift_mig_ops;
		vdev->log_ops = &airlift_log_ops;
	}
	return 0;
}

static void airlift_release(struct vfio_device *vdev)
{
	struct airlift_dev *dev = to_airlift(vdev);

	xa_destroy(&dev->log.pages);
	vfree(dev->mem);
	mutex_destroy(&dev->pci_lock);
	mutex_destroy(&dev->mem_lock);
	mutex_destroy(&dev->io_lock);
	mutex_destroy(&dev->state_mutex);
}

static const struct vfio_device_ops airlift_ops = {
	.name = "vfio-airlift",
	.init = airlift_init,
	.release = airlift_release,
	.open_device = airlift_open,
	.close_device = airlift_close,
	.bind_iommufd = vfio_iommufd_emulated_bind,
	.unbind_iommufd = vfio_iommufd_emulated_unbind,
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
	.read = airlift_region_read,
	.write = airlift_region_write,
	.ioctl = airlift_ioctl,
	.mmap = airlift_mmap,
	.request = airlift_request,
#if AIRLIFT_REGION_INFO_OP
	.get_region_info_caps = airlift_region_info,
#endif
};

static int airlift_probe(struct mdev_device *mdev)
{
	struct airlift_dev *dev;
	int ret;

	dev = vfio_alloc_device(airlift_dev, vdev, &mdev->dev, &airlift_ops);
	if (IS_ERR(dev))
		return PTR_ERR(dev);
	ret = vfio_register_emulated_iommu_dev(&dev->vdev);
	if (ret) {
		vfio_put_device(&dev->vdev);
		return ret;
	}
	dev_set_drvdata(&mdev->dev, dev);
	mutex_lock(&airlift_list_lock);
	list_add_tail(&dev->list, &airlift_devices);
	mutex_unlock(&airlift_list_lock);
	return 0;
}

static void airlift_remove(struct mdev_device *mdev)
{
	struct airlift_dev *dev = dev_get_drvdata(&mdev->dev);

	mutex_lock(&airlift_list_lock);
	list_del_init(&dev->list);
	mutex_unlock(&airlift_list_lock);
	airlift_unblock(dev);	/* the knobs are gone by now, and nobody else would wake the threads that wait */
	vfio_unregister_group_dev(&dev->vdev);
	vfio_put_device(&dev->vdev);
}

#define AIRLIFT_TYPE(_name, _flags) { .type = { .sysfs_name = _name, .pretty_name = "Airlift " _name }, .migration_flags = _flags }

static struct airlift_type airlift_types[] = {
	AIRLIFT_TYPE("v2", VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P | VFIO_MIGRATION_PRE_COPY),
	AIRLIFT_TYPE("v2-no-p2p", VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_PRE_COPY),
	AIRLIFT_TYPE("v2-no-precopy", VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P),
	AIRLIFT_TYPE("v2-plain", VFIO_MIGRATION_STOP_COPY),
	AIRLIFT_TYPE("v1", 0),
};

static struct mdev_type *airlift_type_list[ARRAY_SIZE(airlift_types)];

static struct mdev_driver airlift_driver = {
	.device_api = VFIO_DEVICE_API_PCI_STRING,
	.max_instances = 64,
	.driver = {
		.name = "airlift",
		.owner = THIS_MODULE,
		.mod_name = KBUILD_MODNAME,
		.dev_groups = airlift_groups,
	},
	.probe = airlift_probe,
	.remove = airlift_remove,
};

/* The mdev core names the types after the class of the parent. */
static struct class airlift_class = { .name = "airlift" };
static struct device *airlift_device;
static struct mdev_parent airlift_parent;

static int __init airlift_module_init(void)
{
	unsigned int i;
	int ret;

	for (i = 0; i < ARRAY_SIZE(airlift_types); i++)
		airlift_type_list[i] = &airlift_types[i].type;

	airlift_wq = alloc_workqueue("airlift", WQ_UNBOUND, 0);
	if (!airlift_wq)
		return -ENOMEM;
	ret = class_register(&airlift_class);
	if (ret)
		goto out_wq;
	ret = mdev_register_driver(&airlift_driver);
	if (ret)
		goto out_class;
	airlift_device = device_create(&airlift_class, NULL, MKDEV(0, 0), NULL, "airlift");
	if (IS_ERR(airlift_device)) {
		ret = PTR_ERR(airlift_device);
		goto out_driver;
	}
	ret = mdev_register_parent(&airlift_parent, airlift_device, &airlift_driver,
				   airlift_type_list, ARRAY_SIZE(airlift_type_list));
	if (ret)
		goto out_device;
	return 0;

out_device:
	device_unregister(airlift_device);
out_driver:
	mdev_unregister_driver(&airlift_driver);
out_class:
	class_unregister(&airlift_class);
out_wq:
	destroy_workqueue(airlift_wq);
	return ret;
}

static void __exit airlift_module_exit(void)
{
	mdev_unregister_parent(&airlift_parent);
	device_unregister(airlift_device);
	mdev_unregister_driver(&airlift_driver);
	class_unregister(&airlift_class);
	destroy_workqueue(airlift_wq);
}

module_init(airlift_module_init);
module_exit(airlift_module_exit);

MODULE_DESCRIPTION("Test devices for VFIO migration");
MODULE_LICENSE("Dual BSD/GPL");
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
MODULE_IMPORT_NS("IOMMUFD");	/* iova_bitmap_set() */
#else
MODULE_IMPORT_NS(IOMMUFD);
#endif
