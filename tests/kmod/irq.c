// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * Interrupts: INTx (1), MSI (4), MSI-X (4) and the request to give the device back (1), each an eventfd that SET_IRQS installs.
 * As with vfio-pci only one of INTx, MSI and MSI-X is in use at a time. INTx is masked when it fires, and what comes while it is
 * masked fires at the unmask. The mask bits of MSI and MSI-X are for user space, they hold nothing back here; mask and unmask by
 * eventfd are not there (ENOTTY).
 */
#include "airlift.h"

unsigned int airlift_irq_count(u32 index)
{
	switch (index) {
	case VFIO_PCI_INTX_IRQ_INDEX:
	case VFIO_PCI_REQ_IRQ_INDEX:
		return 1;
	case VFIO_PCI_MSI_IRQ_INDEX:
	case VFIO_PCI_MSIX_IRQ_INDEX:
		return AIRLIFT_VECTORS;
	default:
		return 0;
	}
}

int airlift_irq_info(struct vfio_irq_info *info)
{
	info->count = airlift_irq_count(info->index);
	if (!info->count)
		return -EINVAL;
	info->flags = VFIO_IRQ_INFO_EVENTFD;
	if (info->index == VFIO_PCI_INTX_IRQ_INDEX)
		info->flags |= VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED;
	else
		info->flags |= VFIO_IRQ_INFO_NORESIZE;
	return 0;
}

static void airlift_irq_set(struct airlift_irq *irq, u32 vector, struct eventfd_ctx *trigger)
{
	if (irq->trigger[vector])
		eventfd_ctx_put(irq->trigger[vector]);
	irq->trigger[vector] = trigger;
}

static bool airlift_irq_used(const struct airlift_irq *irq)
{
	u32 i;

	for (i = 0; i < AIRLIFT_VECTORS; i++)
		if (irq->trigger[i])
			return true;
	return false;
}

static void airlift_irq_disable(struct airlift_irq *irq)
{
	u32 i;

	for (i = 0; i < AIRLIFT_VECTORS; i++)
		airlift_irq_set(irq, i, NULL);
	irq->masked = false;
	irq->pending = false;
}

/* Under pci_lock. */
static void airlift_irq_fire(struct airlift_irq *irq, u32 index, u32 vector)
{
	if (!irq->trigger[vector])
		return;
	if (index == VFIO_PCI_INTX_IRQ_INDEX) {
		if (irq->masked) {
			irq->pending = true;
			return;
		}
		irq->masked = true;
	}
	eventfd_signal(irq->trigger[vector]);
}

static void airlift_irq_unmask(struct airlift_irq *irq)
{
	irq->masked = false;
	if (irq->pending) {
		irq->pending = false;
		airlift_irq_fire(irq, VFIO_PCI_INTX_IRQ_INDEX, 0);
	}
}

/* Whether another kind of interrupt is in use already. */
static bool airlift_irq_conflict(const struct airlift_dev *dev, u32 index)
{
	u32 other;

	if (index > VFIO_PCI_MSIX_IRQ_INDEX)
		return false;
	for (other = VFIO_PCI_INTX_IRQ_INDEX; other <= VFIO_PCI_MSIX_IRQ_INDEX; other++)
		if (other != index && airlift_irq_used(&dev->irq[other]))
			return true;
	return false;
}

/* Installs eventfds: all of them, or none. A descriptor of -1 takes one away. Under pci_lock. */
static int airlift_irq_install(struct airlift_dev *dev, const struct vfio_irq_set *hdr, const s32 *fds)
{
	struct eventfd_ctx *ctx[AIRLIFT_VECTORS] = {};
	u32 i;

	if (airlift_irq_conflict(dev, hdr->index))
		return -EINVAL;
	for (i = 0; i < hdr->count; i++) {
		if (fds[i] == -1)
			continue;
		ctx[i] = eventfd_ctx_fdget(fds[i]);
		if (IS_ERR(ctx[i])) {
			int ret = PTR_ERR(ctx[i]);

			while (i--)
				if (ctx[i])
					eventfd_ctx_put(ctx[i]);
			return ret;
		}
	}
	for (i = 0; i < hdr->count; i++)
		airlift_irq_set(&dev->irq[hdr->index], hdr->start + i, ctx[i]);
	return 0;
}

static int airlift_irq_trigger(struct airlift_dev *dev, const struct vfio_irq_set *hdr, const void *data)
{
	struct airlift_irq *irq = &dev->irq[hdr->index];
	const u8 *wanted = data;
	u32 i;

	if (hdr->flags & VFIO_IRQ_SET_DATA_EVENTFD)
		return airlift_irq_install(dev, hdr, data);
	if (!hdr->count) {
		if (!(hdr->flags & VFIO_IRQ_SET_DATA_NONE) || hdr->start)
			return -EINVAL;
		airlift_irq_disable(irq);
		return 0;
	}
	if (!airlift_irq_used(irq))
		return -EINVAL;
	for (i = 0; i < hdr->count; i++)
		if ((hdr->flags & VFIO_IRQ_SET_DATA_NONE) || wanted[i])
			airlift_irq_fire(irq, hdr->index, hdr->start + i);
	return 0;
}

/* VFIO_DEVICE_SET_IRQS, after the core has checked the header: start and count fit the index, data holds count elements. */
int airlift_set_irqs(struct airlift_dev *dev, const struct vfio_irq_set *hdr, void *data)
{
	struct airlift_irq *irq = &dev->irq[hdr->index];
	u32 action = hdr->flags & VFIO_IRQ_SET_ACTION_TYPE_MASK;
	int ret = 0;

	mutex_lock(&dev->pci_lock);
	if (action == VFIO_IRQ_SET_ACTION_TRIGGER) {
		ret = airlift_irq_trigger(dev, hdr, data);
	} else if (hdr->index != VFIO_PCI_INTX_IRQ_INDEX || (hdr->flags & VFIO_IRQ_SET_DATA_EVENTFD)) {
		ret = -ENOTTY;
	} else if (!airlift_irq_used(irq) || hdr->count != 1 ||
		   (action != VFIO_IRQ_SET_ACTION_MASK && action != VFIO_IRQ_SET_ACTION_UNMASK)) {
		ret = -EINVAL;
	} else if ((hdr->flags & VFIO_IRQ_SET_DATA_NONE) || *(u8 *)data) {
		if (action == VFIO_IRQ_SET_ACTION_MASK)
			irq->masked = true;
		else
			airlift_irq_unmask(irq);
	}
	mutex_unlock(&dev->pci_lock);
	return ret;
}

/* The knob `interrupt`. A device that does not run raises none: io_lock keeps it from stopping meanwhile. */
int airlift_irq_raise(struct airlift_dev *dev, u32 index, u32 vector)
{
	int ret = 0;

	if (index >= VFIO_PCI_NUM_IRQS || vector >= airlift_irq_count(index))
		return -EINVAL;
	mutex_lock(&dev->io_lock);
	mutex_lock(&dev->pci_lock);
	if (!dev->runs)
		ret = -EIO;
	else if (!dev->irq[index].trigger[vector])
		ret = -ENXIO;
	else
		airlift_irq_fire(&dev->irq[index], index, vector);
	mutex_unlock(&dev->pci_lock);
	mutex_unlock(&dev->io_lock);
	return ret;
}

/* A reset of the function: nothing is pending any more. Who listens stays. */
void airlift_irq_reset(struct airlift_dev *dev)
{
	mutex_lock(&dev->pci_lock);
	dev->irq[VFIO_PCI_INTX_IRQ_INDEX].masked = false;
	dev->irq[VFIO_PCI_INTX_IRQ_INDEX].pending = false;
	mutex_unlock(&dev->pci_lock);
}

/* The last close. */
void airlift_irq_release(struct airlift_dev *dev)
{
	u32 i;

	mutex_lock(&dev->pci_lock);
	for (i = 0; i < VFIO_PCI_NUM_IRQS; i++)
		airlift_irq_disable(&dev->irq[i]);
	mutex_unlock(&dev->pci_lock);
}

/* The device is being removed and user space still has it: ask for it, each time that the core asks. */
void airlift_request(struct vfio_device *vdev, unsigned int count)
{
	struct airlift_dev *dev = to_airlift(vdev);
	struct eventfd_ctx *trigger;

	mutex_lock(&dev->pci_lock);
	trigger = dev->irq[VFIO_PCI_REQ_IRQ_INDEX].trigger[0];
	if (trigger)
		eventfd_signal(trigger);
	else if (!count)
		dev_notice(vdev->dev, "is to be removed, and waits for user space to close it\n");
	mutex_unlock(&dev->pci_lock);
}
