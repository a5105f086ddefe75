//! One ioctl.

use airlift_core::Errno;
use rustix::ioctl::{self, Ioctl, Opcode};
use std::ffi::c_void;
use std::os::fd::BorrowedFd;

/// A request whose argument the kernel reads and writes in place.
struct Request {
    opcode: Opcode,
    argument: *mut c_void,
}

// SAFETY: `opcode` and `as_ptr` are the pair that the caller of `call` vouched for; the output is the
// call's own result and reads no memory. `IS_MUTATING` is the careful answer.
unsafe impl Ioctl for Request {
    type Output = i32;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(out: ioctl::IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

/// The error number of a failed system call.
pub(super) fn errno(error: rustix::io::Errno) -> Errno {
    Errno(error.raw_os_error())
}

/// The last error number of a call into libc.
pub(super) fn last_errno() -> Errno {
    Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

/// `_IO(';', base + number)`: VFIO and iommufd number all of their requests in this way and pass the
/// argument's size in the argument itself.
const fn opcode(number: u8) -> Opcode {
    ioctl::opcode::none(b';', number)
}

/// Makes the request `number` with `argument`, which the kernel reads and writes in place.
///
/// # Safety
/// `argument` begins with its own size as the request expects it and is as long as it says; every
/// pointer in it is valid for what the request does with it for as long as the request uses it.
pub(super) unsafe fn call<T>(fd: BorrowedFd<'_>, number: u8, argument: &mut T) -> Result<i32, Errno> {
    let request = Request { opcode: opcode(number), argument: std::ptr::from_mut(argument).cast() };
    // SAFETY: the caller vouches for opcode and argument.
    unsafe { ioctl::ioctl(fd, request) }.map_err(errno)
}

/// As [`call`] with a buffer of any length; 8-byte aligned, as all of the structures need.
///
/// # Safety
/// As [`call`].
pub(super) unsafe fn call_buffer(fd: BorrowedFd<'_>, number: u8, buffer: &mut [u64]) -> Result<i32, Errno> {
    let request = Request { opcode: opcode(number), argument: buffer.as_mut_ptr().cast() };
    // SAFETY: the caller vouches for opcode and argument.
    unsafe { ioctl::ioctl(fd, request) }.map_err(errno)
}

/// As [`call`] with a plain number in place of an argument.
///
/// # Safety
/// The request `number` takes a number, not a pointer.
pub(super) unsafe fn call_value(fd: BorrowedFd<'_>, number: u8, value: usize) -> Result<i32, Errno> {
    let request = Request { opcode: opcode(number), argument: std::ptr::without_provenance_mut(value) };
    // SAFETY: the caller vouches that the argument is not used as a pointer.
    unsafe { ioctl::ioctl(fd, request) }.map_err(errno)
}

/// The size of `T` as the kernel's structures state it.
pub(super) const fn size_of<T>() -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "structures of an ioctl have tens of bytes")]
    {
        std::mem::size_of::<T>() as u32
    }
}
