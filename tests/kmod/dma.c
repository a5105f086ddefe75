// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * DMA into the memory of whoever has the device open, and the log of the pages that it wrote.
 *
 * The log is exact by page of its own size. A page is in the log before it is written, and a report waits for the write, so a
 * page can be reported too often but never too rarely.
 */
#include <linux/log2.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "airlift.h"

struct airlift_dma_work {
	struct work_struct work;
	struct airlift_dev *dev;
	u64 iova, length;
	u8 value;
	int ret;
};

static bool airlift_logged_range(struct airlift_dev *dev, u64 iova, u64 last)
{
	return interval_tree_iter_first(&dev->log.ranges, iova, last);
}

/* Writes a piece that lies in one 4 KiB page. Under io_lock. */
static int airlift_dma_page(struct airlift_dev *dev, u64 iova, void *data, size_t len)
{
	struct airlift_log *log = &dev->log;
	unsigned long index = iova >> log->shift;
	bool logged = log->on && airlift_logged_range(dev, iova, iova + len - 1);
	void *old = NULL;
	int ret;

	if (logged) {
		old = xa_store(&log->pages, index, xa_mk_value(1), GFP_KERNEL_ACCOUNT);
		if (xa_is_err(old))
			return xa_err(old);
	}
	ret = vfio_dma_rw(&dev->vdev, iova, data, len, true);
	/* EFAULT may have written a part; any other error has written nothing. */
	if (ret && ret != -EFAULT && logged && !old)
		xa_erase(&log->pages, index);
	return ret;
}

/* On a worker, as a device is not a thread of the user: type1 refuses other processes than the one that mapped the memory. */
static void airlift_dma_run(struct work_struct *work)
{
	struct airlift_dma_work *dma = container_of(work, struct airlift_dma_work, work);
	struct airlift_dev *dev = dma->dev;
	u64 iova = dma->iova, left = dma->length, n;
	u8 *data;

	data = kmalloc(AIRLIFT_PAGE, GFP_KERNEL_ACCOUNT);
	if (!data) {
		dma->ret = -ENOMEM;
		return;
	}
	memset(data, dma->value, AIRLIFT_PAGE);
	while (left && !dma->ret) {
		n = min_t(u64, left, AIRLIFT_PAGE - (iova & (AIRLIFT_PAGE - 1)));
		/* Page by page, so that a long write does not keep the device from stopping. */
		mutex_lock(&dev->io_lock);
		dma->ret = dev->open && dev->runs ? airlift_dma_page(dev, iova, data, n) : -EIO;
		mutex_unlock(&dev->io_lock);
		if (!dma->ret)
			atomic64_inc(&dev->dma_writes);
		iova += n;
		left -= n;
		cond_resched();
	}
	kfree(data);
}

/* The knob `dma`. */
int airlift_dma(struct airlift_dev *dev, u64 iova, u64 length, u8 value)
{
	struct airlift_dma_work dma = { .dev = dev, .iova = iova, .length = length, .value = value };
	u64 end;

	if (!length || length > AIRLIFT_MAX_STATE || check_add_overflow(iova, length - 1, &end))
		return -EINVAL;
	INIT_WORK_ONSTACK(&dma.work, airlift_dma_run);
	queue_work(airlift_wq, &dma.work);
	flush_work(&dma.work);
	destroy_work_on_stack(&dma.work);
	return dma.ret;
}

/* Under io_lock. */
static void airlift_log_clear(struct airlift_dev *dev)
{
	dev->log.on = false;
	dev->log.ranges = RB_ROOT_CACHED;
	kvfree(dev->log.nodes);
	dev->log.nodes = NULL;
	xa_destroy(&dev->log.pages);
}

/* The core has checked that the ranges do not overlap and are aligned to the page size that was asked for. */
static int airlift_log_start(struct vfio_device *vdev, struct rb_root_cached *ranges, u32 nnodes, u64 *page_size)
{
	struct airlift_dev *dev = to_airlift(vdev);
	u64 most = READ_ONCE(dev->log_max_ranges);
	struct interval_tree_node *node, *copy;
	u32 i = 0;
	int ret = 0;

	if (READ_ONCE(dev->log_fail))
		return -EOPNOTSUPP;
	if (*page_size && !is_power_of_2(*page_size))
		return -EINVAL;
	mutex_lock(&dev->io_lock);
	if (dev->log.on) {
		ret = -EINVAL;
		goto out;
	}
	if (most && nnodes > most) {
		vfio_combine_iova_ranges(ranges, nnodes, most);
		nnodes = most;
	}
	copy = kvcalloc(nnodes, sizeof(*copy), GFP_KERNEL_ACCOUNT);
	if (!copy) {
		ret = -ENOMEM;
		goto out;
	}
	dev->log.ranges = RB_ROOT_CACHED;
	for (node = interval_tree_iter_first(ranges, 0, ULONG_MAX); node && i < nnodes;
	     node = interval_tree_iter_next(node, 0, ULONG_MAX), i++) {
		copy[i].start = node->start;
		copy[i].last = node->last;
		interval_tree_insert(&copy[i], &dev->log.ranges);
	}
	dev->log.nodes = copy;
	dev->log.shift = ilog2(READ_ONCE(dev->log_page_size));
	dev->log.on = true;
	*page_size = 1ULL << dev->log.shift;
out:
	mutex_unlock(&dev->io_lock);
	return ret;
}

static int airlift_log_stop(struct vfio_device *vdev)
{
	struct airlift_dev *dev = to_airlift(vdev);

	mutex_lock(&dev->io_lock);
	if (dev->log.on)
		airlift_log_clear(dev);
	mutex_unlock(&dev->io_lock);
	return 0;
}

/* A page of the log that is only partly in the range is reported, and stays for who asks for the other part. */
static int airlift_log_report(struct vfio_device *vdev, unsigned long iova, unsigned long length, struct iova_bitmap *dirty)
{
	struct airlift_dev *dev = to_airlift(vdev);
	unsigned long last = iova + length - 1;
	unsigned long index, from, to;
	unsigned int shift;
	int ret = 0;
	void *entry;

	mutex_lock(&dev->io_lock);
	if (!dev->log.on) {
		ret = -EINVAL;
		goto out;
	}
	if (!length)
		goto out;
	shift = dev->log.shift;
	xa_for_each_range(&dev->log.pages, index, entry, iova >> shift, last >> shift) {
		from = max(index << shift, iova);
		to = min((index << shift) + (1UL << shift) - 1, last);
		iova_bitmap_set(dirty, from, to - from + 1);
		if (to - from == (1UL << shift) - 1)
			xa_erase(&dev->log.pages, index);
	}
out:
	mutex_unlock(&dev->io_lock);
	return ret;
}

const struct vfio_log_ops airlift_log_ops = {
	.log_start = airlift_log_start,
	.log_stop = airlift_log_stop,
	.log_read_and_clear = airlift_log_report,
};

/* The last close. */
void airlift_log_release(struct airlift_dev *dev)
{
	airlift_log_stop(&dev->vdev);
}
