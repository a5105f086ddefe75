// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The knobs and counters in sysfs. The table is in airlift_mdev.c; those that make the device fail and wait are in faults.c.
 */
#include <linux/log2.h>
#include <linux/slab.h>
#include <linux/sysfs.h>
#include <linux/vmalloc.h>

#include "airlift.h"

#define MAX_PEER_RATE 100000

/* A knob or counter that is one number at an offset of struct airlift_dev. */
struct airlift_attr {
	struct device_attribute attr;
	size_t offset;
	u64 max;
};

static ssize_t airlift_number_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct airlift_attr *knob = container_of(attr, struct airlift_attr, attr);
	u64 *value = (void *)airlift_of(device) + knob->offset;

	return sysfs_emit(buf, "%llu\n", READ_ONCE(*value));
}

static ssize_t airlift_number_store(struct device *device, struct device_attribute *attr, const char *buf, size_t len)
{
	struct airlift_attr *knob = container_of(attr, struct airlift_attr, attr);
	struct airlift_dev *dev = airlift_of(device);
	u64 value;

	if (kstrtou64(buf, 0, &value) || value > knob->max)
		return -EINVAL;
	WRITE_ONCE(*(u64 *)((void *)dev + knob->offset), value);
	airlift_activity_kick(dev);
	return len;
}

static ssize_t airlift_counter_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct airlift_attr *knob = container_of(attr, struct airlift_attr, attr);
	atomic64_t *value = (void *)airlift_of(device) + knob->offset;

	return sysfs_emit(buf, "%lld\n", atomic64_read(value));
}

#define KNOB(_name, _max) \
	static struct airlift_attr knob_##_name = { \
		__ATTR(_name, 0644, airlift_number_show, airlift_number_store), offsetof(struct airlift_dev, _name), _max }
#define COUNTER(_name) \
	static struct airlift_attr knob_##_name = { \
		__ATTR(_name, 0444, airlift_counter_show, NULL), offsetof(struct airlift_dev, _name), 0 }

KNOB(precopy_zero, 1);
KNOB(short_reads, U64_MAX);
KNOB(eagain, U64_MAX);
KNOB(eintr, U64_MAX);
KNOB(dirty_rate, AIRLIFT_MAX_STATE);
KNOB(reset_on_close, 1);
KNOB(log_max_ranges, U32_MAX);
KNOB(log_fail, 1);
KNOB(peer_rate, MAX_PEER_RATE);
COUNTER(opens);
COUNTER(resets);
COUNTER(reads);
COUNTER(bytes_read);
COUNTER(bytes_written);
COUNTER(dma_writes);
COUNTER(peer_sent);
COUNTER(peer_received);
COUNTER(peer_lost);
COUNTER(peer_gaps);

/* Cuts a text at its white space. Says how many words there are, -EINVAL if too many; the words live in *text. */
int airlift_words(const char *buf, char **text, char **words)
{
	char *at, *word;
	int count = 0;

	*text = kstrdup(buf, GFP_KERNEL);
	if (!*text)
		return -ENOMEM;
	at = strim(*text);
	while ((word = strsep(&at, " \t\n"))) {
		if (!*word)
			continue;
		if (count == AIRLIFT_WORDS)
			return -EINVAL;
		words[count++] = word;
	}
	return count;
}

static ssize_t blocked_show(struct device *device, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%d\n", atomic_read(&airlift_of(device)->blocked));
}
static DEVICE_ATTR_RO(blocked);

static ssize_t state_size_show(struct device *device, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%llu\n", READ_ONCE(airlift_of(device)->state_size));
}

/* Zeroed memory for a state. Too much is ENOMEM, and not the end of some process. */
u8 *airlift_alloc_state(u64 size)
{
	return __vmalloc(size, GFP_KERNEL_ACCOUNT | __GFP_ZERO | __GFP_RETRY_MAYFAIL | __GFP_NOWARN);
}

static ssize_t state_size_store(struct device *device, struct device_attribute *attr, const char *buf, size_t len)
{
	struct airlift_dev *dev = airlift_of(device);
	u8 *mem = NULL;
	ssize_t ret = len;
	u64 size;

	if (kstrtou64(buf, 0, &size) || size > AIRLIFT_MAX_STATE)
		return -EINVAL;
	if (size) {
		mem = airlift_alloc_state(size);
		if (!mem)
			return -ENOMEM;
	}
	mutex_lock(&dev->io_lock);
	if (dev->open) {
		ret = -EBUSY;
	} else {
		mutex_lock(&dev->mem_lock);
		swap(dev->mem, mem);
		WRITE_ONCE(dev->state_size, size);
		mutex_unlock(&dev->mem_lock);
	}
	mutex_unlock(&dev->io_lock);
	vfree(mem);
	return ret;
}
static DEVICE_ATTR_RW(state_size);

static ssize_t log_page_size_show(struct device *device, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%llu\n", READ_ONCE(airlift_of(device)->log_page_size));
}

static ssize_t log_page_size_store(struct device *device, struct device_attribute *attr, const char *buf, size_t len)
{
	u64 size;

	if (kstrtou64(buf, 0, &size) || size < AIRLIFT_PAGE || size > SZ_1G || !is_power_of_2(size))
		return -EINVAL;
	WRITE_ONCE(airlift_of(device)->log_page_size, size);
	return len;
}
static DEVICE_ATTR_RW(log_page_size);

static ssize_t peer_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct airlift_dev *dev = airlift_of(device);
	bool has_peer;
	guid_t peer;

	mutex_lock(&dev->io_lock);
	has_peer = dev->has_peer;
	peer = dev->peer;
	mutex_unlock(&dev->io_lock);
	return has_peer ? sysfs_emit(buf, "%pUl\n", &peer) : sysfs_emit(buf, "\n");
}

static ssize_t peer_store(struct device *device, struct device_attribute *attr, const char *buf, size_t len)
{
	struct airlift_dev *dev = airlift_of(device);
	char *text, *words[AIRLIFT_WORDS];
	guid_t peer = {};
	bool has_peer = false;
	int ret;

	ret = airlift_words(buf, &text, words);
	if (ret == 1) {
		has_peer = true;
		ret = strlen(words[0]) == UUID_STRING_LEN ? guid_parse(words[0], &peer) : -EINVAL;
	} else if (ret > 1) {
		ret = -EINVAL;
	}
	kfree(text);
	if (ret)
		return ret;
	mutex_lock(&dev->io_lock);
	dev->has_peer = has_peer;
	dev->peer = peer;
	mutex_unlock(&dev->io_lock);
	return len;
}
static DEVICE_ATTR_RW(peer);

static ssize_t reinit_store(struct device *device, struct device_attribute *attr, const char *buf, size_t len)
{
	bool on;
	int ret;

	if (kstrtobool(buf, &on) || !on)
		return -EINVAL;
	ret = airlift_v2_reinit(airlift_of(device));
	return ret ? ret : len;
}

/* There is no request that could be pending: the flag in the data file's ioctl is what user space looks at. */
static ssize_t reinit_show(struct device *device, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "0\n");
}
static DEVICE_ATTR_RW(reinit);

static ssize_t dma_store(struct device *device, struct device_attribute *attr, const char *buf, size_t len)
{
	char *text, *words[AIRLIFT_WORDS];
	u64 iova, length;
	u8 value;
	int ret;

	ret = airlift_words(buf, &text, words);
	if (ret >= 0)
		ret = ret == 3 && !kstrtou64(words[0], 0, &iova) && !kstrtou64(words[1], 0, &length) &&
		      !kstrtou8(words[2], 0, &value) ? 0 : -EINVAL;
	kfree(text);
	if (!ret)
		ret = airlift_dma(airlift_of(device), iova, length, value);
	return ret ? ret : len;
}
static DEVICE_ATTR_WO(dma);

static ssize_t interrupt_store(struct device *device, struct device_attribute *attr, const char *buf, size_t len)
{
	char *text, *words[AIRLIFT_WORDS];
	u32 index, vector;
	int ret;

	ret = airlift_words(buf, &text, words);
	if (ret >= 0)
		ret = ret == 2 && !kstrtou32(words[0], 0, &index) && !kstrtou32(words[1], 0, &vector) ? 0 : -EINVAL;
	kfree(text);
	if (!ret)
		ret = airlift_irq_raise(airlift_of(device), index, vector);
	return ret ? ret : len;
}
static DEVICE_ATTR_WO(interrupt);

/* A mapped section is whole pages, a sparse one at least a page for each of its four parts. Under io_lock. */
static int airlift_v1_configure(struct airlift_dev *dev, u64 section, u64 map)
{
	if (dev->open)
		return -EBUSY;
	if (map == AIRLIFT_MAPPED && !PAGE_ALIGNED(section))
		return -EINVAL;
	if (map == AIRLIFT_SPARSE && section % (4 * PAGE_SIZE))
		return -EINVAL;
	dev->v1.section_size = section;
	dev->v1_map = map;
	return 0;
}

static ssize_t v1_section_show(struct device *device, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%llu\n", READ_ONCE(airlift_of(device)->v1.section_size));
}

static ssize_t v1_section_store(struct device *device, struct device_attribute *attr, const char *buf, size_t len)
{
	struct airlift_dev *dev = airlift_of(device);
	u64 size;
	int ret;

	if (kstrtou64(buf, 0, &size) || !size || size > AIRLIFT_MAX_SECTION)
		return -EINVAL;
	mutex_lock(&dev->io_lock);
	ret = airlift_v1_configure(dev, size, dev->v1_map);
	mutex_unlock(&dev->io_lock);
	return ret ? ret : len;
}
static DEVICE_ATTR_RW(v1_section);

static const char *const airlift_maps[] = {
	[AIRLIFT_TRAPPED] = "trapped",
	[AIRLIFT_MAPPED] = "mapped",
	[AIRLIFT_SPARSE] = "sparse",
};

static ssize_t v1_map_show(struct device *device, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%s\n", airlift_maps[READ_ONCE(airlift_of(device)->v1_map)]);
}

static ssize_t v1_map_store(struct device *device, struct device_attribute *attr, const char *buf, size_t len)
{
	struct airlift_dev *dev = airlift_of(device);
	int map = sysfs_match_string(airlift_maps, buf);
	int ret;

	if (map < 0)
		return map;
	mutex_lock(&dev->io_lock);
	ret = airlift_v1_configure(dev, dev->v1.section_size, map);
	mutex_unlock(&dev->io_lock);
	return ret ? ret : len;
}
static DEVICE_ATTR_RW(v1_map);

/* Without a lock: it can be asked for while an arc waits. */
static ssize_t state_show(struct device *device, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", READ_ONCE(airlift_of(device)->state));
}
static DEVICE_ATTR_RO(state);

static ssize_t digest_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct airlift_dev *dev = airlift_of(device);
	u64 digest;

	mutex_lock(&dev->mem_lock);
	digest = airlift_digest(dev->mem, dev->state_size);
	mutex_unlock(&dev->mem_lock);
	return sysfs_emit(buf, "%016llx\n", digest);
}
static DEVICE_ATTR_RO(digest);

static struct attribute *airlift_attrs[] = {
	&knob_precopy_zero.attr.attr, &knob_short_reads.attr.attr, &knob_eagain.attr.attr, &knob_eintr.attr.attr,
	&knob_dirty_rate.attr.attr, &knob_reset_on_close.attr.attr, &knob_log_max_ranges.attr.attr, &knob_log_fail.attr.attr,
	&knob_peer_rate.attr.attr, &knob_opens.attr.attr, &knob_resets.attr.attr, &knob_reads.attr.attr,
	&knob_bytes_read.attr.attr, &knob_bytes_written.attr.attr, &knob_dma_writes.attr.attr, &knob_peer_sent.attr.attr,
	&knob_peer_received.attr.attr, &knob_peer_lost.attr.attr, &knob_peer_gaps.attr.attr,
	&dev_attr_fail_arc.attr, &dev_attr_fail_read.attr, &dev_attr_fail_write.attr, &dev_attr_block.attr,
	&dev_attr_blocked.attr, &dev_attr_state_size.attr, &dev_attr_log_page_size.attr, &dev_attr_peer.attr,
	&dev_attr_reinit.attr, &dev_attr_dma.attr, &dev_attr_interrupt.attr, &dev_attr_v1_section.attr, &dev_attr_v1_map.attr,
	&dev_attr_state.attr, &dev_attr_digest.attr,
	NULL,
};

/* The knobs of the one interface are not there on a device of the other. */
static umode_t airlift_attr_visible(struct kobject *kobj, struct attribute *attr, int n)
{
	struct airlift_dev *dev = airlift_of(kobj_to_dev(kobj));

	if (attr == &dev_attr_v1_section.attr || attr == &dev_attr_v1_map.attr)
		return airlift_is_v1(dev) ? attr->mode : 0;
	if (attr == &dev_attr_reinit.attr)
		return airlift_is_v1(dev) ? 0 : attr->mode;
	return attr->mode;
}

static const struct attribute_group airlift_group = {
	.name = "airlift",
	.attrs = airlift_attrs,
	.is_visible = airlift_attr_visible,
};

const struct attribute_group *airlift_groups[] = { &airlift_group, NULL };
