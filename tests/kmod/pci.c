// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * The PCI side: config space, BAR0 (the state), BAR2 (MSI-X table and pending bits), and the regions in which user space sees them.
 * Config space and MSI-X table are registers that hold what is written and do nothing; interrupts go where SET_IRQS says.
 */
#include <linux/log2.h>
#include <linux/pci_regs.h>
#include <linux/slab.h>
#include <linux/unaligned.h>

#include "airlift.h"

#define CAP_VENDOR 0x40
#define CAP_MSI 0x50
#define CAP_MSIX 0x70
#define MSIX_PBA 0x800

#define VENDOR_ID 0xa117

/* Config space and MSI-X table as after power on. */
void airlift_pci_reset(struct airlift_dev *dev)
{
	u8 *c = dev->config;
	unsigned int i;

	mutex_lock(&dev->pci_lock);
	memset(c, 0, sizeof(dev->config));
	put_unaligned_le16(VENDOR_ID, c + PCI_VENDOR_ID);
	put_unaligned_le16(airlift_is_v1(dev) ? 2 : 1, c + PCI_DEVICE_ID);
	put_unaligned_le16(PCI_STATUS_CAP_LIST, c + PCI_STATUS);
	c[PCI_REVISION_ID] = 1;
	c[PCI_CLASS_DEVICE + 1] = 0xff;
	put_unaligned_le16(VENDOR_ID, c + PCI_SUBSYSTEM_VENDOR_ID);
	put_unaligned_le16(airlift_is_v1(dev) ? 2 : 1, c + PCI_SUBSYSTEM_ID);
	c[PCI_CAPABILITY_LIST] = CAP_VENDOR;
	c[PCI_INTERRUPT_PIN] = 1;

	c[CAP_VENDOR] = PCI_CAP_ID_VNDR;
	c[CAP_VENDOR + 1] = CAP_MSI;
	c[CAP_VENDOR + 2] = 16;
	memcpy(c + CAP_VENDOR + 4, "airlift", 7);

	c[CAP_MSI] = PCI_CAP_ID_MSI;
	c[CAP_MSI + 1] = CAP_MSIX;
	put_unaligned_le16(PCI_MSI_FLAGS_64BIT | PCI_MSI_FLAGS_MASKBIT | (ilog2(AIRLIFT_VECTORS) << 1), c + CAP_MSI + PCI_MSI_FLAGS);

	c[CAP_MSIX] = PCI_CAP_ID_MSIX;
	put_unaligned_le16(AIRLIFT_VECTORS - 1, c + CAP_MSIX + PCI_MSIX_FLAGS);
	put_unaligned_le32(2, c + CAP_MSIX + PCI_MSIX_TABLE);
	put_unaligned_le32(2 | MSIX_PBA, c + CAP_MSIX + PCI_MSIX_PBA);

	memset(dev->table, 0, sizeof(dev->table));
	for (i = 0; i < AIRLIFT_VECTORS; i++)
		dev->table[i * PCI_MSIX_ENTRY_SIZE + PCI_MSIX_ENTRY_VECTOR_CTRL] = PCI_MSIX_ENTRY_CTRL_MASKBIT;
	mutex_unlock(&dev->pci_lock);
}

/* The bits of a 32-bit memory BAR that can be written: what finds its size by writing ones. */
static u32 airlift_bar_mask(u64 size)
{
	return size ? ~(u32)(roundup_pow_of_two(max_t(u64, size, 16)) - 1) : 0;
}

/* The writable bits of the aligned dword at `at`. */
static u32 airlift_config_mask(const struct airlift_dev *dev, unsigned int at)
{
	switch (at) {
	case PCI_COMMAND:
		return PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_DISABLE;
	case PCI_BASE_ADDRESS_0:
		return airlift_bar_mask(dev->state_size);	/* the same as long as the device is open */
	case PCI_BASE_ADDRESS_2:
		return airlift_bar_mask(AIRLIFT_BAR2_SIZE);
	case PCI_INTERRUPT_LINE:
		return 0xff;
	case CAP_MSI:
		return (u32)(PCI_MSI_FLAGS_ENABLE | PCI_MSI_FLAGS_QSIZE) << 16;
	case CAP_MSI + PCI_MSI_ADDRESS_LO:
		return ~3U;
	case CAP_MSI + PCI_MSI_ADDRESS_HI:
		return ~0U;
	case CAP_MSI + PCI_MSI_DATA_64:
		return 0xffff;
	case CAP_MSI + PCI_MSI_MASK_64:
		return BIT(AIRLIFT_VECTORS) - 1;
	case CAP_MSIX:
		return (u32)(PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL) << 16;
	default:
		return 0;
	}
}

static void airlift_config_write(struct airlift_dev *dev, unsigned int offset, const u8 *data, size_t len)
{
	size_t i;

	for (i = 0; i < len; i++) {
		unsigned int at = offset + i;
		u8 mask = airlift_config_mask(dev, at & ~3U) >> (8 * (at & 3));

		dev->config[at] = (dev->config[at] & ~mask) | (data[i] & mask);
	}
}

/* Of BAR2 only the table can be written; there is nothing behind it but pending bits, which are never set. */
static void airlift_bar2_access(struct airlift_dev *dev, unsigned int offset, u8 *data, size_t len, bool write)
{
	size_t i;

	for (i = 0; i < len; i++) {
		bool in_table = offset + i < sizeof(dev->table);

		if (!write)
			data[i] = in_table ? dev->table[offset + i] : 0;
		else if (in_table)
			dev->table[offset + i] = data[i];
	}
}

static u64 airlift_region_size(const struct airlift_dev *dev, u32 index)
{
	switch (index) {
	case VFIO_PCI_BAR0_REGION_INDEX:
		return dev->state_size;
	case VFIO_PCI_BAR2_REGION_INDEX:
		return AIRLIFT_BAR2_SIZE;
	case VFIO_PCI_CONFIG_REGION_INDEX:
		return AIRLIFT_CONFIG_SIZE;
	default:
		return 0;
	}
}

/* VFIO_DEVICE_GET_REGION_INFO. There is no VGA region, and vfio-pci says so with EINVAL. */
int airlift_region_info(struct vfio_device *vdev, struct vfio_region_info *info, struct vfio_info_cap *caps)
{
	struct airlift_dev *dev = to_airlift(vdev);

	info->flags = 0;
	info->size = 0;
	info->offset = (u64)info->index << AIRLIFT_INDEX_SHIFT;
	if (info->index == AIRLIFT_V1_REGION && airlift_is_v1(dev))
		return airlift_v1_region_info(dev, info, caps);
	if (info->index >= VFIO_PCI_VGA_REGION_INDEX)
		return -EINVAL;
	info->size = airlift_region_size(dev, info->index);
	if (info->size)
		info->flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
	return 0;
}

/* One piece of a region, through a buffer of the kernel's. */
static int airlift_piece(struct airlift_dev *dev, u32 index, u64 offset, u8 *data, size_t len, bool write)
{
	int ret = 0;

	if (index == VFIO_PCI_BAR0_REGION_INDEX) {
		mutex_lock(&dev->mem_lock);
		if (!write) {
			memcpy(data, dev->mem + offset, len);
		} else if (!dev->runs) {
			ret = -EIO;
		} else {
			memcpy(dev->mem + offset, data, len);
			airlift_mark_dirty(dev, offset, len);
		}
		mutex_unlock(&dev->mem_lock);
		return ret;
	}
	mutex_lock(&dev->pci_lock);
	if (index == VFIO_PCI_BAR2_REGION_INDEX)
		airlift_bar2_access(dev, offset, data, len, write);
	else if (write)
		airlift_config_write(dev, offset, data, len);
	else
		memcpy(data, dev->config + offset, len);
	mutex_unlock(&dev->pci_lock);
	return ret;
}

static ssize_t airlift_region_access(struct vfio_device *vdev, char __user *buf, size_t count, loff_t *ppos, bool write)
{
	struct airlift_dev *dev = to_airlift(vdev);
	u64 offset = *ppos & AIRLIFT_OFFSET_MASK;
	u64 index = (u64)*ppos >> AIRLIFT_INDEX_SHIFT;
	size_t done = 0, n;
	ssize_t ret = 0;
	u64 size;
	u8 *data;

	if (index == AIRLIFT_V1_REGION && airlift_is_v1(dev)) {
		ret = airlift_v1_access(dev, buf, count, offset, write);
		if (ret > 0)
			*ppos += ret;
		return ret;
	}
	if (index >= VFIO_PCI_NUM_REGIONS)
		return -EINVAL;
	size = airlift_region_size(dev, index);
	if (offset >= size)
		return -EINVAL;
	count = min_t(u64, count, size - offset);
	data = kmalloc(min_t(size_t, max_t(size_t, count, 1), AIRLIFT_PAGE), GFP_KERNEL_ACCOUNT);
	if (!data)
		return -ENOMEM;
	while (done < count) {
		n = min_t(size_t, count - done, AIRLIFT_PAGE);
		if (write && copy_from_user(data, buf + done, n)) {
			ret = -EFAULT;
			break;
		}
		ret = airlift_piece(dev, index, offset + done, data, n, write);
		if (ret)
			break;
		if (!write && copy_to_user(buf + done, data, n)) {
			ret = -EFAULT;
			break;
		}
		done += n;
		cond_resched();
	}
	kfree(data);
	if (!done)
		return ret;
	*ppos += done;
	return done;
}

ssize_t airlift_region_read(struct vfio_device *vdev, char __user *buf, size_t count, loff_t *ppos)
{
	return airlift_region_access(vdev, buf, count, ppos, false);
}

ssize_t airlift_region_write(struct vfio_device *vdev, const char __user *buf, size_t count, loff_t *ppos)
{
	return airlift_region_access(vdev, (char __user *)buf, count, ppos, true);
}
