/* SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause */
/*
 * What the files of the test driver share: one device, its locks, its streams.
 *
 * Locks, in the order in which they are taken:
 *
 *   state_mutex   the migration state machine and the v1 region. Held over a whole arc, as real drivers do.
 *   file->lock    one data file: its record buffer, its parser.
 *   io_lock       what the device does outward (DMA, writes to its peer), DMA logging, `open`, and the knobs that an open
 *                 device must not see change. A state change takes it, so an arc ends only when outstanding DMA has ended.
 *   list_lock     the list of all devices.
 *   mem_lock      state memory, its dirty maps, `state`, `runs`, `initiates`. Nothing is taken under it.
 *
 * pci_lock (config space, MSI-X table, interrupts) and knob_lock (faults that are asked for) are taken last: under any of the
 * locks before mem_lock, and with nothing under them. file->lock and io_lock are never held together.
 * User memory is touched under file->lock and io_lock only, so mmap takes no lock at all.
 */
#ifndef AIRLIFT_H
#define AIRLIFT_H

#include <linux/device.h>
#include <linux/eventfd.h>
#include <linux/fs.h>
#include <linux/interval_tree.h>
#include <linux/ktime.h>
#include <linux/mdev.h>
#include <linux/mutex.h>
#include <linux/sizes.h>
#include <linux/spinlock.h>
#include <linux/uuid.h>
#include <linux/version.h>
#include <linux/vfio.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

/* GET_REGION_INFO reaches a driver through an operation of its own in newer kernels, and as an ioctl before. */
#define AIRLIFT_REGION_INFO_OP (LINUX_VERSION_CODE >= KERNEL_VERSION(7, 0, 0))

#define AIRLIFT_PAGE SZ_4K
#define AIRLIFT_MAX_STATE SZ_1G
#define AIRLIFT_DEFAULT_STATE SZ_1M
#define AIRLIFT_BAR2_SIZE SZ_4K
#define AIRLIFT_CONFIG_SIZE 256
#define AIRLIFT_VECTORS 4
#define AIRLIFT_V1_REGION VFIO_PCI_NUM_REGIONS
#define AIRLIFT_MAX_SECTION SZ_16M

#define AIRLIFT_INDEX_SHIFT 40
#define AIRLIFT_OFFSET_MASK ((1ULL << AIRLIFT_INDEX_SHIFT) - 1)

enum airlift_v1_map { AIRLIFT_TRAPPED, AIRLIFT_MAPPED, AIRLIFT_SPARSE };
enum airlift_blockable { AIRLIFT_BLOCK_NONE, AIRLIFT_BLOCK_READ, AIRLIFT_BLOCK_WRITE, AIRLIFT_BLOCK_ARC };

struct airlift_type {
	struct mdev_type type;
	unsigned int migration_flags;	/* 0: the v1 region instead */
};

/* The way out: what the stream still has to give. The maps and counts are under mem_lock, the record under its owner's lock. */
struct airlift_save {
	unsigned long *initial;		/* pages of the initial part */
	unsigned long *dirty;		/* pages that changed after they were given */
	u64 initial_left;		/* bytes, with record headers and the stream's header */
	u64 dirty_left;
	unsigned long cursor;		/* the page after the last one given: the search goes on there */
	bool stopped;			/* no page changes any more: the trailer may follow */
	bool header_given, trailer_given;
	bool from_initial;		/* what part the record buffer came from */
	u32 start, end;			/* the unread part of record */
	u8 record[16 + AIRLIFT_PAGE];
};

/* The way in. Under its owner's lock. */
struct airlift_load {
	enum { LOAD_HEADER, LOAD_RECORD, LOAD_DATA, LOAD_SUM, LOAD_END } stage;
	u8 head[24];
	u32 have;			/* bytes of head */
	u64 offset;
	u32 left;			/* of the record's data */
	u64 sum;
	const char *bad;		/* why the stream cannot be loaded, NULL: it can so far */
};

/* An open data file of interface v2. */
struct airlift_file {
	struct airlift_dev *dev;
	struct file *filp;
	struct mutex lock;
	bool disabled;			/* the session is over: ENODEV */
	bool saving;
	u64 done;			/* bytes through the file */
	u64 reads;			/* reads that were answered; the faults that come every Nth read count these */
	bool eintr_given;
	bool held, hold_over;		/* a read that waits for `hold`, and one that has waited */
	struct work_struct hold;
	bool reinit;			/* VFIO_PRECOPY_INFO_REINIT is to be reported */
	struct airlift_save *save;
	struct airlift_load *load;
	void *bounce;			/* AIRLIFT_PAGE bytes, loading only */
};

struct airlift_fail_arc { bool on, error; u32 from, to; int err; };
struct airlift_fail_io { bool on; u64 after; int err; };
struct airlift_block { enum airlift_blockable what; u32 from, to; bool uninterruptible; };

/* The interface v1 region. Under state_mutex, but for the section's bytes, which user space maps. */
struct airlift_v1 {
	u32 device_state;
	void *section;			/* vmalloc_user, while open */
	u64 section_size;		/* bytes; fixed while open */
	u32 data_offset;
	u64 staged;			/* bytes of the chunk in the section */
	bool chunk;			/* data_offset was read: a chunk is out */
	u64 done;			/* bytes of this session */
	struct airlift_save *save;
	struct airlift_load *load;
};

struct airlift_irq {
	struct eventfd_ctx *trigger[AIRLIFT_VECTORS];
	bool masked, pending;		/* INTx only */
};

struct airlift_log {
	bool on;
	struct rb_root_cached ranges;
	struct interval_tree_node *nodes;
	unsigned int shift;
	struct xarray pages;		/* index: IOVA >> shift */
};

struct airlift_dev {
	struct vfio_device vdev;
	const struct airlift_type *type;
	struct list_head list;
	wait_queue_head_t wait;

	struct mutex state_mutex;
	unsigned long reset_pending;
	struct airlift_file *file;
	struct airlift_v1 v1;

	struct mutex io_lock;
	bool open;
	struct airlift_log log;
	struct delayed_work activity;
	ktime_t activity_at;
	u64 dirty_credit, peer_credit;	/* millionths of a byte, of a write */
	u64 dirty_cursor, dirty_pattern;
	bool has_peer;
	guid_t peer;

	struct mutex mem_lock;
	enum vfio_device_mig_state state;
	bool runs;			/* its state may change, it may do DMA and raise interrupts */
	bool initiates;			/* it may start writes to a peer */
	u8 *mem;
	u64 state_size;
	struct airlift_save *save;	/* who wants to know of dirty pages */
	u64 peer_last, peer_next;	/* used where the state memory has no room for them */

	struct mutex pci_lock;
	u8 config[AIRLIFT_CONFIG_SIZE];
	u8 table[AIRLIFT_VECTORS * 16];
	struct airlift_irq irq[VFIO_PCI_NUM_IRQS];

	spinlock_t knob_lock;
	struct airlift_fail_arc fail_arc;
	struct airlift_fail_io fail_read, fail_write;
	struct airlift_block block;
	atomic_t blocked;

	/* Knobs that are one number. Read without a lock. */
	u64 precopy_zero, short_reads, eagain, eintr, dirty_rate, reset_on_close;
	u64 log_max_ranges, log_page_size, log_fail, peer_rate, v1_map;

	/* Counters, from the creation of the device. */
	atomic64_t opens, resets, reads, bytes_read, bytes_written, dma_writes;
	atomic64_t peer_sent, peer_received, peer_lost, peer_gaps;
};

static inline struct airlift_dev *to_airlift(struct vfio_device *vdev)
{
	return container_of(vdev, struct airlift_dev, vdev);
}

/* The device behind an mdev: what the knobs are given. */
static inline struct airlift_dev *airlift_of(struct device *device)
{
	return dev_get_drvdata(device);
}

static inline bool airlift_is_v1(const struct airlift_dev *dev)
{
	return !dev->type->migration_flags;
}

/* airlift_mdev.c */
extern struct workqueue_struct *airlift_wq;
extern struct list_head airlift_devices;
extern struct mutex airlift_list_lock;
int airlift_lock_state(struct airlift_dev *dev);
void airlift_unlock_state(struct airlift_dev *dev);

/* knobs.c */
#define AIRLIFT_WORDS 5
extern const struct attribute_group *airlift_groups[];
u8 *airlift_alloc_state(u64 size);
int airlift_words(const char *buf, char **text, char **words);

/* faults.c */
extern struct device_attribute dev_attr_fail_arc, dev_attr_fail_read, dev_attr_fail_write, dev_attr_block;
int airlift_fail_arc(struct airlift_dev *dev, u32 from, u32 to, bool *error);
int airlift_fail_io(struct airlift_dev *dev, bool write, u64 done, size_t *len);
bool airlift_blocks(struct airlift_dev *dev, enum airlift_blockable what, u32 from, u32 to);
int airlift_block_here(struct airlift_dev *dev, enum airlift_blockable what, u32 from, u32 to,
		       bool nonblock, const struct airlift_file *file);
void airlift_unblock(struct airlift_dev *dev);

/* pci.c */
void airlift_pci_reset(struct airlift_dev *dev);
int airlift_region_info(struct vfio_device *vdev, struct vfio_region_info *info, struct vfio_info_cap *caps);
ssize_t airlift_region_read(struct vfio_device *vdev, char __user *buf, size_t count, loff_t *ppos);
ssize_t airlift_region_write(struct vfio_device *vdev, const char __user *buf, size_t count, loff_t *ppos);

/* irq.c */
int airlift_irq_info(struct vfio_irq_info *info);
unsigned int airlift_irq_count(u32 index);
int airlift_set_irqs(struct airlift_dev *dev, const struct vfio_irq_set *hdr, void *data);
int airlift_irq_raise(struct airlift_dev *dev, u32 index, u32 vector);
void airlift_irq_reset(struct airlift_dev *dev);
void airlift_irq_release(struct airlift_dev *dev);
void airlift_request(struct vfio_device *vdev, unsigned int count);

/* stream.c */
u64 airlift_digest(const u8 *mem, u64 size);
void airlift_clear_state(struct airlift_dev *dev);
u64 airlift_stream_size(struct airlift_dev *dev);
void airlift_mark_dirty(struct airlift_dev *dev, u64 offset, u64 length);
struct airlift_save *airlift_save_start(struct airlift_dev *dev, bool stopped);
void airlift_save_stop(struct airlift_dev *dev, struct airlift_save *save);
void airlift_save_free(struct airlift_save *save);
void airlift_save_stopped(struct airlift_dev *dev, struct airlift_save *save);
void airlift_save_again(struct airlift_dev *dev, struct airlift_save *save, bool initial);
void airlift_save_left(struct airlift_dev *dev, struct airlift_save *save, u64 *initial, u64 *dirty, u64 *trailer);
const void *airlift_save_peek(struct airlift_dev *dev, struct airlift_save *save, size_t *len);
void airlift_save_consume(struct airlift_save *save, size_t len);
ssize_t airlift_load_feed(struct airlift_dev *dev, struct airlift_load *load, const u8 *data, size_t len);
int airlift_load_finish(struct airlift_dev *dev, struct airlift_load *load);

/* v2.c */
extern const struct vfio_migration_ops airlift_mig_ops;
void airlift_enter(struct airlift_dev *dev, enum vfio_device_mig_state state, bool runs, bool initiates);
void airlift_v2_enter(struct airlift_dev *dev, enum vfio_device_mig_state state);
void airlift_v2_close(struct airlift_dev *dev);
void airlift_file_end(struct airlift_dev *dev);
int airlift_v2_reinit(struct airlift_dev *dev);

/* v1.c */
int airlift_v1_open(struct airlift_dev *dev);
void airlift_v1_close(struct airlift_dev *dev);
void airlift_v1_reset(struct airlift_dev *dev);
int airlift_v1_region_info(struct airlift_dev *dev, struct vfio_region_info *info, struct vfio_info_cap *caps);
ssize_t airlift_v1_access(struct airlift_dev *dev, char __user *buf, size_t count, u64 offset, bool write);
int airlift_v1_mmap(struct airlift_dev *dev, struct vm_area_struct *vma);

/* dma.c */
extern const struct vfio_log_ops airlift_log_ops;
void airlift_log_release(struct airlift_dev *dev);
int airlift_dma(struct airlift_dev *dev, u64 iova, u64 length, u8 value);

/* activity.c */
void airlift_activity(struct work_struct *work);
void airlift_activity_kick(struct airlift_dev *dev);

#endif
