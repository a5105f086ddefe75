// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * Faults that a test asks for: arcs and data that fail (fail_arc, fail_read, fail_write), and threads that wait (block).
 * What asks for one and what looks whether one is due are side by side here; where they strike is in v2.c and v1.c.
 */
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/sysfs.h>

#include "airlift.h"

#define MAX_FAULT 511	/* above are the errnos that the kernel keeps to itself */

static int airlift_fault(const char *word, int *err)
{
	return kstrtoint(word, 0, err) || *err < 1 || *err > MAX_FAULT ? -EINVAL : 0;
}

static int airlift_parse_fail_arc(int count, char **words, struct airlift_fail_arc *fail)
{
	if (!count)
		return 0;
	if (count < 3 || count > 4 || kstrtou32(words[0], 0, &fail->from) || kstrtou32(words[1], 0, &fail->to) ||
	    fail->from > 7 || fail->to > 7 || airlift_fault(words[2], &fail->err))
		return -EINVAL;
	if (count == 4 && strcmp(words[3], "error"))
		return -EINVAL;
	fail->error = count == 4;
	fail->on = true;
	return 0;
}

static ssize_t fail_arc_store(struct device *device, struct device_attribute *attr, const char *buf, size_t len)
{
	struct airlift_dev *dev = airlift_of(device);
	struct airlift_fail_arc fail = {};
	char *text, *words[AIRLIFT_WORDS];
	int ret;

	ret = airlift_words(buf, &text, words);
	if (ret >= 0)
		ret = airlift_parse_fail_arc(ret, words, &fail);
	kfree(text);
	if (ret)
		return ret;
	spin_lock(&dev->knob_lock);
	dev->fail_arc = fail;
	spin_unlock(&dev->knob_lock);
	return len;
}

static ssize_t fail_arc_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct airlift_dev *dev = airlift_of(device);
	struct airlift_fail_arc fail;

	spin_lock(&dev->knob_lock);
	fail = dev->fail_arc;
	spin_unlock(&dev->knob_lock);
	if (!fail.on)
		return sysfs_emit(buf, "\n");
	return sysfs_emit(buf, "%u %u %d%s\n", fail.from, fail.to, fail.err, fail.error ? " error" : "");
}
DEVICE_ATTR_RW(fail_arc);

/* What the knob says of this arc: 0, or -errno and whether the device breaks. */
int airlift_fail_arc(struct airlift_dev *dev, u32 from, u32 to, bool *error)
{
	struct airlift_fail_arc fail;

	spin_lock(&dev->knob_lock);
	fail = dev->fail_arc;
	spin_unlock(&dev->knob_lock);
	*error = fail.error;
	return fail.on && fail.from == from && fail.to == to ? -fail.err : 0;
}

static ssize_t airlift_fail_io_store(struct device *device, bool write, const char *buf, size_t len)
{
	struct airlift_dev *dev = airlift_of(device);
	struct airlift_fail_io fail = {};
	char *text, *words[AIRLIFT_WORDS];
	int ret;

	ret = airlift_words(buf, &text, words);
	if (ret == 2) {
		ret = kstrtou64(words[0], 0, &fail.after) || airlift_fault(words[1], &fail.err) ? -EINVAL : 0;
		fail.on = true;
	} else if (ret > 0) {
		ret = -EINVAL;
	}
	kfree(text);
	if (ret)
		return ret;
	spin_lock(&dev->knob_lock);
	*(write ? &dev->fail_write : &dev->fail_read) = fail;
	spin_unlock(&dev->knob_lock);
	return len;
}

static ssize_t airlift_fail_io_show(struct device *device, bool write, char *buf)
{
	struct airlift_dev *dev = airlift_of(device);
	struct airlift_fail_io fail;

	spin_lock(&dev->knob_lock);
	fail = write ? dev->fail_write : dev->fail_read;
	spin_unlock(&dev->knob_lock);
	return fail.on ? sysfs_emit(buf, "%llu %d\n", fail.after, fail.err) : sysfs_emit(buf, "\n");
}

static ssize_t fail_read_show(struct device *device, struct device_attribute *attr, char *buf)
{
	return airlift_fail_io_show(device, false, buf);
}

static ssize_t fail_read_store(struct device *device, struct device_attribute *attr, const char *buf, size_t len)
{
	return airlift_fail_io_store(device, false, buf, len);
}
DEVICE_ATTR_RW(fail_read);

static ssize_t fail_write_show(struct device *device, struct device_attribute *attr, char *buf)
{
	return airlift_fail_io_show(device, true, buf);
}

static ssize_t fail_write_store(struct device *device, struct device_attribute *attr, const char *buf, size_t len)
{
	return airlift_fail_io_store(device, true, buf, len);
}
DEVICE_ATTR_RW(fail_write);

/* After `done` bytes of a session: the -errno that is due, or 0 and at most as many bytes as there are before it. */
int airlift_fail_io(struct airlift_dev *dev, bool write, u64 done, size_t *len)
{
	struct airlift_fail_io fail;

	spin_lock(&dev->knob_lock);
	fail = write ? dev->fail_write : dev->fail_read;
	spin_unlock(&dev->knob_lock);
	if (!fail.on)
		return 0;
	if (done >= fail.after)
		return -fail.err;
	*len = min_t(u64, *len, fail.after - done);
	return 0;
}

static int airlift_parse_block(int count, char **words, struct airlift_block *block)
{
	if (count && !strcmp(words[count - 1], "uninterruptible")) {
		block->uninterruptible = true;
		if (!--count)
			return -EINVAL;
	}
	if (!count)
		return 0;
	if (count == 1 && !strcmp(words[0], "read"))
		block->what = AIRLIFT_BLOCK_READ;
	else if (count == 1 && !strcmp(words[0], "write"))
		block->what = AIRLIFT_BLOCK_WRITE;
	else if (count == 3 && !strcmp(words[0], "arc") && !kstrtou32(words[1], 0, &block->from) && block->from <= 7 &&
		 !kstrtou32(words[2], 0, &block->to) && block->to <= 7)
		block->what = AIRLIFT_BLOCK_ARC;
	else
		return -EINVAL;
	return 0;
}

static ssize_t block_store(struct device *device, struct device_attribute *attr, const char *buf, size_t len)
{
	struct airlift_dev *dev = airlift_of(device);
	struct airlift_block block = {};
	char *text, *words[AIRLIFT_WORDS];
	int ret;

	ret = airlift_words(buf, &text, words);
	if (ret >= 0)
		ret = airlift_parse_block(ret, words, &block);
	kfree(text);
	if (ret)
		return ret;
	spin_lock(&dev->knob_lock);
	dev->block = block;
	spin_unlock(&dev->knob_lock);
	wake_up(&dev->wait);
	return len;
}

static ssize_t block_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct airlift_dev *dev = airlift_of(device);
	struct airlift_block block;
	const char *suffix;

	spin_lock(&dev->knob_lock);
	block = dev->block;
	spin_unlock(&dev->knob_lock);
	suffix = block.uninterruptible ? " uninterruptible" : "";
	switch (block.what) {
	case AIRLIFT_BLOCK_READ:
		return sysfs_emit(buf, "read%s\n", suffix);
	case AIRLIFT_BLOCK_WRITE:
		return sysfs_emit(buf, "write%s\n", suffix);
	case AIRLIFT_BLOCK_ARC:
		return sysfs_emit(buf, "arc %u %u%s\n", block.from, block.to, suffix);
	default:
		return sysfs_emit(buf, "\n");
	}
}
DEVICE_ATTR_RW(block);

static bool airlift_blocks_how(struct airlift_dev *dev, enum airlift_blockable what, u32 from, u32 to, bool *uninterruptible)
{
	struct airlift_block block;

	spin_lock(&dev->knob_lock);
	block = dev->block;
	spin_unlock(&dev->knob_lock);
	*uninterruptible = block.uninterruptible;
	return block.what == what && (what != AIRLIFT_BLOCK_ARC || (block.from == from && block.to == to));
}

bool airlift_blocks(struct airlift_dev *dev, enum airlift_blockable what, u32 from, u32 to)
{
	bool uninterruptible;

	return airlift_blocks_how(dev, what, from, to, &uninterruptible);
}

/* Waits as long as the knob says so, and until the data file (if it is one) is at its end. EINTR if a signal came. */
int airlift_block_here(struct airlift_dev *dev, enum airlift_blockable what, u32 from, u32 to,
		       bool nonblock, const struct airlift_file *file)
{
	bool uninterruptible;
	int ret;

	if (!airlift_blocks_how(dev, what, from, to, &uninterruptible) || (file && READ_ONCE(file->disabled)))
		return 0;
	if (nonblock)
		return -EAGAIN;
	atomic_inc(&dev->blocked);
	if (uninterruptible)
		ret = wait_event_killable(dev->wait, !airlift_blocks(dev, what, from, to) ||
						     (file && READ_ONCE(file->disabled)));
	else
		ret = wait_event_interruptible(dev->wait, !airlift_blocks(dev, what, from, to) ||
							  (file && READ_ONCE(file->disabled)));
	atomic_dec(&dev->blocked);
	return ret ? -EINTR : 0;
}

void airlift_unblock(struct airlift_dev *dev)
{
	spin_lock(&dev->knob_lock);
	dev->block = (struct airlift_block){};
	spin_unlock(&dev->knob_lock);
	wake_up(&dev->wait);
}
