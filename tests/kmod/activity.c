// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * What the device does by itself while it is open and runs: it changes its own state, and it writes to its peer.
 *
 * A tick each clock tick of the kernel, as long as a rate is set. The amounts follow the time that has passed, at most one second
 * of it, so that they are right on the average also on a slow machine.
 */
#include <linux/math64.h>
#include <linux/unaligned.h>

#include "airlift.h"

/* Where a peer's counter is kept, and where the own one. */
#define PEER_LAST 0
#define PEER_NEXT 8

static void airlift_put(struct airlift_dev *dev, u64 offset, u64 value)
{
	put_unaligned_le64(value, dev->mem + offset);
	airlift_mark_dirty(dev, offset, 8);
}

/* How many units are due, where `rate` are in a second. */
static u64 airlift_due(u64 *credit, u64 rate, u64 elapsed_us)
{
	u64 due;

	*credit += rate * elapsed_us;
	due = div_u64(*credit, USEC_PER_SEC);
	*credit -= due * USEC_PER_SEC;
	return due;
}

/* Writes on through the state, behind the first page (where a test and the peer's counters are) if there is more than one. */
static void airlift_dirty_self(struct airlift_dev *dev, u64 bytes)
{
	u64 base, n;

	mutex_lock(&dev->mem_lock);
	base = dev->state_size > AIRLIFT_PAGE ? AIRLIFT_PAGE : 0;
	bytes = dev->runs ? min(bytes, dev->state_size - base) : 0;
	while (bytes) {
		if (dev->dirty_cursor < base || dev->dirty_cursor >= dev->state_size) {
			dev->dirty_cursor = base;
			dev->dirty_pattern++;
		}
		n = min3(bytes, dev->state_size - dev->dirty_cursor, (u64)AIRLIFT_PAGE);
		memset(dev->mem + dev->dirty_cursor, (u8)(dev->dirty_pattern + (dev->dirty_cursor >> 12)), n);
		airlift_mark_dirty(dev, dev->dirty_cursor, n);
		dev->dirty_cursor += n;
		bytes -= n;
	}
	mutex_unlock(&dev->mem_lock);
}

/* A write of the peer arrives. A device that does not run loses it: that is what the P2P states are for. */
static void airlift_peer_receive(struct airlift_dev *dev, u64 count)
{
	u64 last;

	mutex_lock(&dev->mem_lock);
	if (!dev->runs) {
		atomic64_inc(&dev->peer_lost);
	} else {
		last = dev->state_size >= 8 ? get_unaligned_le64(dev->mem + PEER_LAST) : dev->peer_last;
		if (count != last + 1)
			atomic64_inc(&dev->peer_gaps);
		if (dev->state_size >= 8)
			airlift_put(dev, PEER_LAST, count);
		else
			dev->peer_last = count;
		atomic64_inc(&dev->peer_received);
	}
	mutex_unlock(&dev->mem_lock);
}

static u64 airlift_peer_count(struct airlift_dev *dev)
{
	u64 count;

	mutex_lock(&dev->mem_lock);
	if (dev->state_size >= 16) {
		count = get_unaligned_le64(dev->mem + PEER_NEXT) + 1;
		airlift_put(dev, PEER_NEXT, count);
	} else {
		count = ++dev->peer_next;
	}
	mutex_unlock(&dev->mem_lock);
	return count;
}

/* Under io_lock, which keeps the device in a state that may do this. */
static void airlift_peer_send(struct airlift_dev *dev, u64 writes)
{
	struct airlift_dev *other, *peer = NULL;

	mutex_lock(&airlift_list_lock);
	list_for_each_entry(other, &airlift_devices, list)
		if (guid_equal(&to_mdev_device(other->vdev.dev)->uuid, &dev->peer))
			peer = other;
	for (; writes; writes--) {
		u64 count = airlift_peer_count(dev);

		atomic64_inc(&dev->peer_sent);
		if (peer)
			airlift_peer_receive(peer, count);
		else
			atomic64_inc(&dev->peer_lost);
	}
	mutex_unlock(&airlift_list_lock);
}

void airlift_activity(struct work_struct *work)
{
	struct airlift_dev *dev = container_of(to_delayed_work(work), struct airlift_dev, activity);
	u64 dirty = READ_ONCE(dev->dirty_rate), writes = READ_ONCE(dev->peer_rate), elapsed;
	ktime_t now;

	mutex_lock(&dev->io_lock);
	now = ktime_get();
	elapsed = clamp_t(s64, ktime_us_delta(now, dev->activity_at), 0, USEC_PER_SEC);
	dev->activity_at = now;
	if (!dev->open || (!dirty && !writes))
		goto out;
	if (dirty && dev->runs)
		airlift_dirty_self(dev, airlift_due(&dev->dirty_credit, dirty, elapsed));
	if (writes && dev->has_peer && dev->initiates)
		airlift_peer_send(dev, airlift_due(&dev->peer_credit, writes, elapsed));
	queue_delayed_work(airlift_wq, &dev->activity, 1);
out:
	mutex_unlock(&dev->io_lock);
}

/* The device was opened, or a rate was set. */
void airlift_activity_kick(struct airlift_dev *dev)
{
	mutex_lock(&dev->io_lock);
	if (dev->open && (READ_ONCE(dev->dirty_rate) || READ_ONCE(dev->peer_rate)) && !delayed_work_pending(&dev->activity)) {
		dev->activity_at = ktime_get();
		queue_delayed_work(airlift_wq, &dev->activity, 1);
	}
	mutex_unlock(&dev->io_lock);
}
