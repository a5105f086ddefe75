// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The migration stream: what both interfaces carry. It is little-endian:
 *
 *   header    u64 magic, u32 version, u32 0, u64 state_size                  24 bytes
 *   data      u32 1, u32 length (1 to 1 MiB), u64 offset, the bytes          any number, later ones replace earlier ones
 *   trailer   u32 2, u32 8, u64 state_size, u64 checksum of the whole state  24 bytes
 *
 * A page of the state is one data record. What is read is checked completely, but only airlift_load_finish() tells: a driver
 * learns late what it was given. The checksum finds accidents, not malice.
 */
#include <linux/bitmap.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/unaligned.h>

#include "airlift.h"

#define STREAM_MAGIC 0x3154464c52494117ULL
#define STREAM_VERSION 1
#define STREAM_HEADER 24
#define STREAM_RECORD 16
#define STREAM_SUM 8
#define STREAM_TRAILER (STREAM_RECORD + STREAM_SUM)
#define STREAM_MAX_DATA SZ_1M
#define STREAM_KIND_DATA 1
#define STREAM_KIND_TRAILER 2

static unsigned long airlift_pages(const struct airlift_dev *dev)
{
	return DIV_ROUND_UP(dev->state_size, AIRLIFT_PAGE);
}

static u32 airlift_page_len(const struct airlift_dev *dev, unsigned long page)
{
	return min_t(u64, AIRLIFT_PAGE, dev->state_size - (u64)page * AIRLIFT_PAGE);
}

/* Mixes eight bytes at a time, so that a large state does not take long; the size is part of it. */
u64 airlift_digest(const u8 *mem, u64 size)
{
	u64 hash = 0xcbf29ce484222325ULL ^ (size * 0x9e3779b97f4a7c15ULL);
	u64 at;

	for (at = 0; at + 8 <= size; at += 8) {
		hash = (hash ^ get_unaligned_le64(mem + at)) * 0x100000001b3ULL;
		hash ^= hash >> 29;
		if (!(at & (SZ_1M - 1)))
			cond_resched();
	}
	for (; at < size; at++)
		hash = (hash ^ mem[at]) * 0x100000001b3ULL;
	hash ^= hash >> 32;
	return hash * 0x9e3779b97f4a7c15ULL;
}

/* A state without anything in it: after a reset, and before a stream is loaded, so that nothing else can remain. */
void airlift_clear_state(struct airlift_dev *dev)
{
	mutex_lock(&dev->mem_lock);
	if (dev->state_size)
		memset(dev->mem, 0, dev->state_size);
	dev->peer_last = 0;
	dev->peer_next = 0;
	mutex_unlock(&dev->mem_lock);
}

/* Bytes of a stream in which every page comes once. Under mem_lock. */
u64 airlift_stream_size(struct airlift_dev *dev)
{
	return STREAM_HEADER + airlift_pages(dev) * STREAM_RECORD + dev->state_size + STREAM_TRAILER;
}

/* Under mem_lock. A page that was not given yet needs no second turn. */
void airlift_mark_dirty(struct airlift_dev *dev, u64 offset, u64 length)
{
	struct airlift_save *save = dev->save;
	unsigned long page, last;
	bool was_empty;

	if (!save || !length)
		return;
	was_empty = !save->dirty_left;
	last = (offset + length - 1) / AIRLIFT_PAGE;
	for (page = offset / AIRLIFT_PAGE; page <= last; page++) {
		if (test_bit(page, save->initial) || __test_and_set_bit(page, save->dirty))
			continue;
		save->dirty_left += STREAM_RECORD + airlift_page_len(dev, page);
	}
	if (was_empty && save->dirty_left)
		wake_up(&dev->wait);
}

/* A stream of the whole state; from here on changes are noticed. Under state_mutex, which keeps state_size as it is. */
struct airlift_save *airlift_save_start(struct airlift_dev *dev, bool stopped)
{
	unsigned long pages = airlift_pages(dev);
	struct airlift_save *save;

	save = kzalloc(sizeof(*save), GFP_KERNEL_ACCOUNT);
	if (!save)
		return ERR_PTR(-ENOMEM);
	save->initial = bitmap_alloc(max(pages, 1UL), GFP_KERNEL_ACCOUNT);
	save->dirty = bitmap_zalloc(max(pages, 1UL), GFP_KERNEL_ACCOUNT);
	if (!save->initial || !save->dirty) {
		airlift_save_free(save);
		return ERR_PTR(-ENOMEM);
	}
	bitmap_fill(save->initial, pages);
	save->initial_left = STREAM_HEADER + (u64)pages * STREAM_RECORD + dev->state_size;
	save->stopped = stopped;
	mutex_lock(&dev->mem_lock);
	dev->save = save;
	mutex_unlock(&dev->mem_lock);
	return save;
}

/* Nobody is told of changes any more. The caller frees the stream when nobody reads it. */
void airlift_save_stop(struct airlift_dev *dev, struct airlift_save *save)
{
	mutex_lock(&dev->mem_lock);
	if (dev->save == save)
		dev->save = NULL;
	mutex_unlock(&dev->mem_lock);
}

void airlift_save_free(struct airlift_save *save)
{
	if (!save)
		return;
	bitmap_free(save->initial);
	bitmap_free(save->dirty);
	kfree(save);
}

/* The device has stopped: the rest and the trailer may be given. Under the owner's lock. */
void airlift_save_stopped(struct airlift_dev *dev, struct airlift_save *save)
{
	mutex_lock(&dev->mem_lock);
	save->stopped = true;
	mutex_unlock(&dev->mem_lock);
	wake_up(&dev->wait);
}

/*
 * Every page once more, as initial data or as dirty data. A record that is in the buffer comes before the new initial data and
 * counts as such. Under the owner's lock.
 */
void airlift_save_again(struct airlift_dev *dev, struct airlift_save *save, bool initial)
{
	unsigned long pages = airlift_pages(dev);
	u64 all = (u64)pages * STREAM_RECORD + dev->state_size;

	mutex_lock(&dev->mem_lock);
	if (initial) {
		bitmap_fill(save->initial, pages);
		bitmap_zero(save->dirty, pages);
		save->initial_left = all + (save->header_given ? 0 : STREAM_HEADER);
		save->dirty_left = 0;
		save->from_initial = true;
	} else if (pages) {
		airlift_mark_dirty(dev, 0, dev->state_size);
	}
	mutex_unlock(&dev->mem_lock);
	wake_up(&dev->wait);
}

/* Bytes that are left, by part, the record in the buffer included. Under the owner's lock. */
void airlift_save_left(struct airlift_dev *dev, struct airlift_save *save, u64 *initial, u64 *dirty, u64 *trailer)
{
	u32 buffered = save->end - save->start;

	mutex_lock(&dev->mem_lock);
	*initial = save->initial_left;
	*dirty = save->dirty_left;
	*trailer = save->trailer_given ? 0 : STREAM_TRAILER;
	mutex_unlock(&dev->mem_lock);
	if (save->trailer_given)
		*trailer += buffered;
	else if (save->from_initial)
		*initial += buffered;
	else
		*dirty += buffered;
}

static void airlift_record_head(struct airlift_save *save, u32 kind, u32 length, u64 offset)
{
	put_unaligned_le32(kind, save->record);
	put_unaligned_le32(length, save->record + 4);
	put_unaligned_le64(offset, save->record + 8);
	save->start = 0;
	save->end = STREAM_RECORD + length;
}

/* Fills the record buffer with what comes next, if there is something now. Under the owner's lock and mem_lock. */
static void airlift_save_next(struct airlift_dev *dev, struct airlift_save *save)
{
	unsigned long pages = airlift_pages(dev), page;
	unsigned long *map = save->initial;
	u64 *left = &save->initial_left;
	u32 length;

	if (!save->header_given) {
		put_unaligned_le64(STREAM_MAGIC, save->record);
		put_unaligned_le32(STREAM_VERSION, save->record + 8);
		put_unaligned_le32(0, save->record + 12);
		put_unaligned_le64(dev->state_size, save->record + 16);
		save->start = 0;
		save->end = STREAM_HEADER;
		save->header_given = true;
		save->from_initial = true;
		save->initial_left -= STREAM_HEADER;
		return;
	}
	if (!save->initial_left) {
		map = save->dirty;
		left = &save->dirty_left;
	}
	if (*left) {
		page = find_next_bit(map, pages, save->cursor);
		if (page >= pages)
			page = find_first_bit(map, pages);
		if (WARN_ON_ONCE(page >= pages)) {
			*left = 0;
			return;
		}
		__clear_bit(page, map);
		save->cursor = page + 1;
		/* What changes after this copy is marked again. */
		length = airlift_page_len(dev, page);
		airlift_record_head(save, STREAM_KIND_DATA, length, (u64)page * AIRLIFT_PAGE);
		memcpy(save->record + STREAM_RECORD, dev->mem + (u64)page * AIRLIFT_PAGE, length);
		save->from_initial = map == save->initial;
		*left -= STREAM_RECORD + length;
	} else if (save->stopped && !save->trailer_given) {
		airlift_record_head(save, STREAM_KIND_TRAILER, STREAM_SUM, dev->state_size);
		put_unaligned_le64(airlift_digest(dev->mem, dev->state_size), save->record + STREAM_RECORD);
		save->trailer_given = true;
		save->from_initial = false;
	}
}

/* The next bytes, NULL if there are none now. Under the owner's lock. */
const void *airlift_save_peek(struct airlift_dev *dev, struct airlift_save *save, size_t *len)
{
	if (save->start == save->end) {
		mutex_lock(&dev->mem_lock);
		airlift_save_next(dev, save);
		mutex_unlock(&dev->mem_lock);
	}
	*len = save->end - save->start;
	return *len ? save->record + save->start : NULL;
}

void airlift_save_consume(struct airlift_save *save, size_t len)
{
	save->start += len;
}

static void airlift_load_header(struct airlift_dev *dev, struct airlift_load *load)
{
	if (get_unaligned_le64(load->head) != STREAM_MAGIC)
		load->bad = "not a stream of this device";
	else if (get_unaligned_le32(load->head + 8) != STREAM_VERSION || get_unaligned_le32(load->head + 12))
		load->bad = "a version that is not known";
	else if (get_unaligned_le64(load->head + 16) != dev->state_size)
		load->bad = "the state of a device of another size";
	load->stage = LOAD_RECORD;
}

static void airlift_load_record(struct airlift_dev *dev, struct airlift_load *load)
{
	u32 kind = get_unaligned_le32(load->head);
	u32 length = get_unaligned_le32(load->head + 4);
	u64 offset = get_unaligned_le64(load->head + 8);

	if (kind == STREAM_KIND_DATA) {
		if (!length || length > STREAM_MAX_DATA || offset > dev->state_size || length > dev->state_size - offset) {
			load->bad = "a record outside of the state";
			return;
		}
		load->offset = offset;
		load->left = length;
		load->stage = LOAD_DATA;
	} else if (kind == STREAM_KIND_TRAILER) {
		if (length != STREAM_SUM || offset != dev->state_size) {
			load->bad = "a trailer that does not fit";
			return;
		}
		load->stage = LOAD_SUM;
	} else {
		load->bad = "a record of a kind that is not known";
	}
}

/*
 * Takes some bytes of the stream and says how many, -ENOSPC when it is complete already. Once it is bad the rest is taken and
 * forgotten. Under the owner's lock.
 */
ssize_t airlift_load_feed(struct airlift_dev *dev, struct airlift_load *load, const u8 *data, size_t len)
{
	static const u32 want[] = { [LOAD_HEADER] = STREAM_HEADER, [LOAD_RECORD] = STREAM_RECORD, [LOAD_SUM] = STREAM_SUM };
	size_t done = 0, n;

	while (done < len && !load->bad) {
		if (load->stage == LOAD_END)
			return done ? done : -ENOSPC;
		if (load->stage == LOAD_DATA) {
			n = min_t(size_t, load->left, len - done);
			mutex_lock(&dev->mem_lock);
			memcpy(dev->mem + load->offset, data + done, n);
			mutex_unlock(&dev->mem_lock);
			load->offset += n;
			load->left -= n;
			done += n;
			if (!load->left)
				load->stage = LOAD_RECORD;
			continue;
		}
		n = min_t(size_t, want[load->stage] - load->have, len - done);
		memcpy(load->head + load->have, data + done, n);
		load->have += n;
		done += n;
		if (load->have < want[load->stage])
			continue;
		load->have = 0;
		if (load->stage == LOAD_HEADER) {
			airlift_load_header(dev, load);
		} else if (load->stage == LOAD_RECORD) {
			airlift_load_record(dev, load);
		} else {
			load->sum = get_unaligned_le64(load->head);
			load->stage = LOAD_END;
		}
	}
	return len;
}

/* Whether the state is the one that was saved. Under the owner's lock. */
int airlift_load_finish(struct airlift_dev *dev, struct airlift_load *load)
{
	const char *bad = load->bad;

	if (!bad && load->stage != LOAD_END)
		bad = "the stream is not complete";
	if (!bad) {
		mutex_lock(&dev->mem_lock);
		if (airlift_digest(dev->mem, dev->state_size) != load->sum)
			bad = "the checksum is wrong";
		mutex_unlock(&dev->mem_lock);
	}
	if (!bad)
		return 0;
	dev_dbg(dev->vdev.dev, "cannot be loaded: %s\n", bad);
	return -EINVAL;
}
