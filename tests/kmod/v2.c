// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * Interface v2: the state machine and its data files. The core decides which single arc comes next; here are the arcs.
 */
#include <linux/anon_inodes.h>
#include <linux/compat.h>
#include <linux/delay.h>
#include <linux/file.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "airlift.h"

static bool airlift_is_saving(enum vfio_device_mig_state state)
{
	return state == VFIO_DEVICE_STATE_PRE_COPY || state == VFIO_DEVICE_STATE_PRE_COPY_P2P ||
	       state == VFIO_DEVICE_STATE_STOP_COPY;
}

/*
 * The device is in this state from here on. The locks are what an arc promises: DMA and writes to a peer that were under way
 * are over when they are held, and the next ones see the new state. Under state_mutex.
 */
void airlift_enter(struct airlift_dev *dev, enum vfio_device_mig_state state, bool runs, bool initiates)
{
	mutex_lock(&dev->io_lock);
	mutex_lock(&dev->mem_lock);
	WRITE_ONCE(dev->state, state);
	dev->runs = runs;
	dev->initiates = initiates;
	mutex_unlock(&dev->mem_lock);
	mutex_unlock(&dev->io_lock);
}

void airlift_v2_enter(struct airlift_dev *dev, enum vfio_device_mig_state state)
{
	bool initiates = state == VFIO_DEVICE_STATE_RUNNING || state == VFIO_DEVICE_STATE_PRE_COPY;
	bool answers = state == VFIO_DEVICE_STATE_RUNNING_P2P || state == VFIO_DEVICE_STATE_PRE_COPY_P2P;

	airlift_enter(dev, state, initiates || answers, initiates);
}

/*
 * What the knobs do before a read: a read that they make wait waits here, without a lock. Each fault comes once for a read that
 * is then answered, so that a caller who tries again gets on.
 */
static int airlift_read_gate(struct airlift_file *file, bool nonblock)
{
	struct airlift_dev *dev = file->dev;
	u64 eintr = READ_ONCE(dev->eintr), eagain = READ_ONCE(dev->eagain), number;
	int ret;

	ret = airlift_block_here(dev, AIRLIFT_BLOCK_READ, 0, 0, nonblock, file);
	if (ret)
		return ret;
	mutex_lock(&file->lock);
	number = file->reads + 1;
	if (eintr && number % eintr == 0 && !file->eintr_given && !file->disabled) {
		file->eintr_given = true;
		mutex_unlock(&file->lock);
		return -EINTR;
	}
	if (eagain && number % eagain == 0 && !file->held && !file->hold_over && !file->disabled) {
		WRITE_ONCE(file->held, true);
		queue_work(airlift_wq, &file->hold);
	}
	mutex_unlock(&file->lock);
	if (!READ_ONCE(file->held))
		return 0;
	if (nonblock)
		return -EAGAIN;
	return wait_event_interruptible(dev->wait, !READ_ONCE(file->held) || READ_ONCE(file->disabled)) ? -EINTR : 0;
}

static void airlift_hold(struct work_struct *work)
{
	struct airlift_file *file = container_of(work, struct airlift_file, hold);

	usleep_range(1000, 1500);
	mutex_lock(&file->lock);
	file->hold_over = true;
	WRITE_ONCE(file->held, false);
	mutex_unlock(&file->lock);
	wake_up(&file->dev->wait);
}

/* Copies what the stream has, at most len bytes. Under file->lock. */
static ssize_t airlift_give(struct airlift_file *file, char __user *buf, size_t len)
{
	struct airlift_dev *dev = file->dev;
	const void *from;
	size_t done = 0, n;

	while (done < len) {
		from = airlift_save_peek(dev, file->save, &n);
		if (!from)
			break;
		n = min(n, len - done);
		if (copy_to_user(buf + done, from, n))
			return done ? done : -EFAULT;
		airlift_save_consume(file->save, n);
		done += n;
		if (signal_pending(current))
			break;
		cond_resched();
	}
	return done;
}

static ssize_t airlift_file_read(struct file *filp, char __user *buf, size_t len, loff_t *pos)
{
	struct airlift_file *file = filp->private_data;
	struct airlift_dev *dev = file->dev;
	u64 most = READ_ONCE(dev->short_reads);
	ssize_t ret;

	if (pos)
		return -ESPIPE;
	if (!len)
		return 0;
	atomic64_inc(&dev->reads);
	ret = airlift_read_gate(file, filp->f_flags & O_NONBLOCK);
	if (ret)
		return ret;
	if (most)
		len = min_t(u64, len, most);

	mutex_lock(&file->lock);
	if (file->disabled) {
		ret = -ENODEV;
		goto out;
	}
	ret = airlift_fail_io(dev, false, file->done, &len);
	if (ret)
		goto out;
	ret = airlift_give(file, buf, len);
	if (ret > 0) {
		file->done += ret;
		atomic64_add(ret, &dev->bytes_read);
	} else if (!ret && !file->save->stopped && !READ_ONCE(dev->precopy_zero)) {
		ret = -ENOMSG;	/* nothing now; the end comes in STOP_COPY only */
	}
	file->reads++;
	file->eintr_given = false;
	file->hold_over = false;
out:
	mutex_unlock(&file->lock);
	return ret;
}

static ssize_t airlift_file_write(struct file *filp, const char __user *buf, size_t len, loff_t *pos)
{
	struct airlift_file *file = filp->private_data;
	struct airlift_dev *dev = file->dev;
	size_t done = 0, n;
	ssize_t ret;

	if (pos)
		return -ESPIPE;
	if (!len)
		return 0;
	ret = airlift_block_here(dev, AIRLIFT_BLOCK_WRITE, 0, 0, filp->f_flags & O_NONBLOCK, file);
	if (ret)
		return ret;

	mutex_lock(&file->lock);
	if (file->disabled) {
		ret = -ENODEV;
		goto out;
	}
	ret = airlift_fail_io(dev, true, file->done, &len);
	if (ret)
		goto out;
	while (done < len) {
		n = min_t(size_t, len - done, AIRLIFT_PAGE);
		if (copy_from_user(file->bounce, buf + done, n)) {
			ret = -EFAULT;
			break;
		}
		ret = airlift_load_feed(dev, file->load, file->bounce, n);
		if (ret < 0)
			break;
		done += ret;
		if (ret < n || signal_pending(current))
			break;
		cond_resched();
	}
	if (done) {
		file->done += done;
		atomic64_add(done, &dev->bytes_written);
		ret = done;
	}
out:
	mutex_unlock(&file->lock);
	return ret;
}

static __poll_t airlift_file_poll(struct file *filp, poll_table *table)
{
	struct airlift_file *file = filp->private_data;
	struct airlift_dev *dev = file->dev;
	u64 initial, dirty, trailer;
	__poll_t events = 0;

	poll_wait(filp, &dev->wait, table);
	mutex_lock(&file->lock);
	if (file->disabled) {
		events = EPOLLIN | EPOLLRDNORM | EPOLLRDHUP | EPOLLERR;
	} else if (file->saving) {
		airlift_save_left(dev, file->save, &initial, &dirty, &trailer);
		if ((file->save->stopped || initial || dirty) && !file->held &&
		    !airlift_blocks(dev, AIRLIFT_BLOCK_READ, 0, 0))
			events = EPOLLIN | EPOLLRDNORM;
	} else if (!airlift_blocks(dev, AIRLIFT_BLOCK_WRITE, 0, 0)) {
		events = EPOLLOUT | EPOLLWRNORM;
	}
	mutex_unlock(&file->lock);
	return events;
}

#ifdef VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2
static bool airlift_info_v2(const struct airlift_dev *dev)
{
	return dev->vdev.precopy_info_v2;
}
#else
static bool airlift_info_v2(const struct airlift_dev *dev)
{
	return false;
}

/* Kernels that lack the second version of the ioctl lack this too. What user space put into `flags` stays there. */
static int vfio_check_precopy_ioctl(struct vfio_device *vdev, unsigned int cmd, unsigned long arg,
				    struct vfio_precopy_info *info)
{
	unsigned long minsz = offsetofend(struct vfio_precopy_info, dirty_bytes);

	if (cmd != VFIO_MIG_GET_PRECOPY_INFO)
		return -ENOTTY;
	if (copy_from_user(info, (void __user *)arg, minsz))
		return -EFAULT;
	return info->argsz < minsz ? -EINVAL : 0;
}
#endif

static long airlift_file_ioctl(struct file *filp, unsigned int cmd, unsigned long arg)
{
	struct airlift_file *file = filp->private_data;
	struct airlift_dev *dev = file->dev;
	struct vfio_precopy_info info = {};
	u64 initial, dirty, trailer;
	int ret;

	ret = vfio_check_precopy_ioctl(&dev->vdev, cmd, arg, &info);
	if (ret)
		return ret;
	ret = airlift_lock_state(dev);
	if (ret)
		return ret;
	mutex_lock(&file->lock);
	if (dev->state != VFIO_DEVICE_STATE_PRE_COPY && dev->state != VFIO_DEVICE_STATE_PRE_COPY_P2P) {
		ret = -EINVAL;
	} else if (file->disabled) {
		ret = -ENODEV;	/* of an earlier session */
	} else {
		airlift_save_left(dev, file->save, &initial, &dirty, &trailer);
		info.initial_bytes = initial;
		info.dirty_bytes = dirty;
#ifdef VFIO_PRECOPY_INFO_REINIT
		if (file->reinit && airlift_info_v2(dev)) {
			info.flags |= VFIO_PRECOPY_INFO_REINIT;
			file->reinit = false;
		}
#endif
	}
	mutex_unlock(&file->lock);
	airlift_unlock_state(dev);
	if (ret)
		return ret;
	return copy_to_user((void __user *)arg, &info, offsetofend(struct vfio_precopy_info, dirty_bytes)) ? -EFAULT : 0;
}

/* New initial data in a session that runs. Without the opt-in user space may not be told so, and takes it as changes. */
int airlift_v2_reinit(struct airlift_dev *dev)
{
	int ret = airlift_lock_state(dev);

	if (ret)
		return ret;
	if (dev->state != VFIO_DEVICE_STATE_PRE_COPY && dev->state != VFIO_DEVICE_STATE_PRE_COPY_P2P) {
		ret = -EINVAL;
	} else {
		mutex_lock(&dev->file->lock);
		airlift_save_again(dev, dev->file->save, airlift_info_v2(dev));
		dev->file->reinit = airlift_info_v2(dev);
		mutex_unlock(&dev->file->lock);
	}
	airlift_unlock_state(dev);
	return ret;
}

static void airlift_file_free(struct airlift_file *file)
{
	cancel_work_sync(&file->hold);
	airlift_save_free(file->save);
	kfree(file->load);
	kfree(file->bounce);
	mutex_destroy(&file->lock);
	put_device(&file->dev->vdev.device);
	kfree(file);
}

static int airlift_file_release(struct inode *inode, struct file *filp)
{
	airlift_file_free(filp->private_data);
	return 0;
}

static const struct file_operations airlift_save_fops = {
	.owner = THIS_MODULE,
	.read = airlift_file_read,
	.poll = airlift_file_poll,
	.unlocked_ioctl = airlift_file_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.release = airlift_file_release,
};

static const struct file_operations airlift_load_fops = {
	.owner = THIS_MODULE,
	.write = airlift_file_write,
	.poll = airlift_file_poll,
	.release = airlift_file_release,
};

/* A data file, which dev->file holds until the session ends. It may outlive that, and keeps the device. */
static struct airlift_file *airlift_file_open(struct airlift_dev *dev, bool saving, bool stopped)
{
	struct airlift_file *file;
	struct file *filp;
	int ret = -ENOMEM;

	file = kzalloc(sizeof(*file), GFP_KERNEL_ACCOUNT);
	if (!file)
		return ERR_PTR(-ENOMEM);
	file->dev = dev;
	file->saving = saving;
	mutex_init(&file->lock);
	INIT_WORK(&file->hold, airlift_hold);
	get_device(&dev->vdev.device);
	if (saving) {
		file->save = airlift_save_start(dev, stopped);
		if (IS_ERR(file->save)) {
			ret = PTR_ERR(file->save);
			file->save = NULL;
			goto out;
		}
	} else {
		file->bounce = kmalloc(AIRLIFT_PAGE, GFP_KERNEL_ACCOUNT);
		if (!file->bounce)
			goto out;
		file->load = kzalloc(sizeof(*file->load), GFP_KERNEL_ACCOUNT);
		if (!file->load)
			goto out;
	}
	filp = anon_inode_getfile("airlift-migration", saving ? &airlift_save_fops : &airlift_load_fops, file,
				  saving ? O_RDONLY : O_WRONLY);
	if (IS_ERR(filp)) {
		ret = PTR_ERR(filp);
		if (saving)
			airlift_save_stop(dev, file->save);
		goto out;
	}
	stream_open(filp->f_inode, filp);
	file->filp = filp;
	dev->file = file;
	return file;
out:
	airlift_file_free(file);
	return ERR_PTR(ret);
}

/* The session is over, whoever holds the file gets ENODEV. Under state_mutex. */
void airlift_file_end(struct airlift_dev *dev)
{
	struct airlift_file *file = dev->file;

	if (!file)
		return;
	dev->file = NULL;
	mutex_lock(&file->lock);
	WRITE_ONCE(file->disabled, true);
	if (file->saving)
		airlift_save_stop(dev, file->save);
	mutex_unlock(&file->lock);
	wake_up(&dev->wait);
	fput(file->filp);
}

static struct file *airlift_step(struct airlift_dev *dev, enum vfio_device_mig_state from, enum vfio_device_mig_state to)
{
	struct airlift_file *file = NULL;
	bool error;
	int ret;

	dev_dbg(dev->vdev.dev, "%u -> %u\n", from, to);
	ret = airlift_block_here(dev, AIRLIFT_BLOCK_ARC, from, to, false, NULL);
	if (ret)
		return ERR_PTR(ret);
	ret = airlift_fail_arc(dev, from, to, &error);
	if (ret) {
		if (error) {
			airlift_file_end(dev);
			airlift_v2_enter(dev, VFIO_DEVICE_STATE_ERROR);
		}
		return ERR_PTR(ret);
	}

	if (from == VFIO_DEVICE_STATE_RESUMING) {
		mutex_lock(&dev->file->lock);
		ret = airlift_load_finish(dev, dev->file->load);
		mutex_unlock(&dev->file->lock);
		if (ret)
			return ERR_PTR(ret);
	}
	if (to == VFIO_DEVICE_STATE_RESUMING || (airlift_is_saving(to) && !airlift_is_saving(from))) {
		file = airlift_file_open(dev, to != VFIO_DEVICE_STATE_RESUMING, to == VFIO_DEVICE_STATE_STOP_COPY);
		if (IS_ERR(file))
			return ERR_CAST(file);
		get_file(file->filp);
		if (to == VFIO_DEVICE_STATE_RESUMING)
			airlift_clear_state(dev);
	} else if (!airlift_is_saving(to)) {
		airlift_file_end(dev);
	}
	airlift_v2_enter(dev, to);
	if (to == VFIO_DEVICE_STATE_STOP_COPY) {
		/* A read that found nothing in PRE_COPY must not take the new state for its own: nothing would be the end. */
		mutex_lock(&dev->file->lock);
		airlift_save_stopped(dev, dev->file->save);
		mutex_unlock(&dev->file->lock);
	}
	return file ? file->filp : NULL;
}

static struct file *airlift_set_state(struct vfio_device *vdev, enum vfio_device_mig_state target)
{
	struct airlift_dev *dev = to_airlift(vdev);
	enum vfio_device_mig_state next;
	struct file *filp = NULL;
	int ret;

	ret = airlift_lock_state(dev);
	if (ret)
		return ERR_PTR(ret);
	/* Only a reset leads out of ERROR. The core refuses too, but with a warning of the kernel's. */
	if (dev->state == VFIO_DEVICE_STATE_ERROR)
		filp = ERR_PTR(-EINVAL);
	while (!IS_ERR(filp) && dev->state != target) {
		ret = vfio_mig_get_next_state(vdev, dev->state, target, &next);
		filp = ret ? ERR_PTR(ret) : airlift_step(dev, dev->state, next);
		if (WARN_ON(!IS_ERR_OR_NULL(filp) && next != target)) {
			fput(filp);
			filp = ERR_PTR(-EINVAL);
		}
	}
	airlift_unlock_state(dev);
	return filp;
}

static int airlift_get_state(struct vfio_device *vdev, enum vfio_device_mig_state *state)
{
	struct airlift_dev *dev = to_airlift(vdev);
	int ret = airlift_lock_state(dev);

	if (ret)
		return ret;
	*state = dev->state;
	airlift_unlock_state(dev);
	return 0;
}

/* What STOP_COPY would still give if nothing changed any more. */
static int airlift_get_data_size(struct vfio_device *vdev, unsigned long *length)
{
	struct airlift_dev *dev = to_airlift(vdev);
	u64 initial, dirty, trailer;
	int ret = airlift_lock_state(dev);

	if (ret)
		return ret;
	if (dev->file && dev->file->saving) {
		mutex_lock(&dev->file->lock);
		airlift_save_left(dev, dev->file->save, &initial, &dirty, &trailer);
		mutex_unlock(&dev->file->lock);
		*length = initial + dirty + trailer;
	} else {
		mutex_lock(&dev->mem_lock);
		*length = airlift_stream_size(dev);
		mutex_unlock(&dev->mem_lock);
	}
	airlift_unlock_state(dev);
	return 0;
}

const struct vfio_migration_ops airlift_mig_ops = {
	.migration_set_state = airlift_set_state,
	.migration_get_state = airlift_get_state,
	.migration_get_data_size = airlift_get_data_size,
};

/* The last close of a device that keeps its state: a session is left, one that was not loaded has no state to go to. */
void airlift_v2_close(struct airlift_dev *dev)
{
	if (airlift_is_v1(dev))
		return;
	airlift_file_end(dev);
	switch (dev->state) {
	case VFIO_DEVICE_STATE_PRE_COPY:
		airlift_v2_enter(dev, VFIO_DEVICE_STATE_RUNNING);
		break;
	case VFIO_DEVICE_STATE_PRE_COPY_P2P:
		airlift_v2_enter(dev, VFIO_DEVICE_STATE_RUNNING_P2P);
		break;
	case VFIO_DEVICE_STATE_STOP_COPY:
		airlift_v2_enter(dev, VFIO_DEVICE_STATE_STOP);
		break;
	case VFIO_DEVICE_STATE_RESUMING:
		airlift_v2_enter(dev, VFIO_DEVICE_STATE_ERROR);
		break;
	default:
		break;
	}
}
