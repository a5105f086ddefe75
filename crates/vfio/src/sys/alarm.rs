//! A call that can be given up on: a timer that interrupts the thread which makes it (K-GIVE-UP).
//!
//! VFIO's arcs and data reads are synchronous and may wait for hardware that never answers. While a
//! call is made, a timer aims at its thread; when the time is up, or when another thread says so, it
//! sends a signal whose handler does nothing, again and again, so that a signal which comes just
//! before the call begins to wait is not the last one. A wait that the kernel allows to be interrupted
//! then ends with EINTR. One that it does not goes on: the thread stays in it, and whoever waits for
//! that thread must have a deadline of its own (the engine does, and gives up thread and device).

use super::ioctl::last_errno;
use airlift_core::Errno;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How often the signal is repeated until the call has ended.
const AGAIN: Duration = Duration::from_millis(20);

/// How a call ended that did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallError {
    /// The kernel answered with this number.
    Errno(Errno),
    /// The time was up.
    TimedOut,
    /// Another thread ended it.
    Interrupted,
}

/// Ends calls that block. Clones share: whoever has one can end the calls made under any of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Alarm(Arc<Mutex<Calls>>);

/// What an alarm knows.
#[derive(Debug, Default)]
struct Calls {
    /// How often it was rung: that ends what is made of several calls also when it comes between two.
    rings: u64,
    active: Vec<Active>,
}

/// A call that is under way.
#[derive(Debug)]
struct Active {
    number: u64,
    timer: libc::timer_t,
    interrupted: Arc<AtomicBool>,
}

// SAFETY: a timer id is a name that the kernel knows in the whole process; it points to nothing.
unsafe impl Send for Active {}

extern "C" fn ignore(_: libc::c_int) {}

/// The signal, with its handler in place; the first free real-time signal, so that no handler of the
/// embedder's is replaced.
fn signal() -> Result<libc::c_int, Errno> {
    static SIGNAL: OnceLock<Result<libc::c_int, Errno>> = OnceLock::new();
    *SIGNAL.get_or_init(|| {
        for signal in (libc::SIGRTMIN()..=libc::SIGRTMAX()).rev() {
            let mut old = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: a null new action only asks; `old` is writable.
            if unsafe { libc::sigaction(signal, std::ptr::null(), old.as_mut_ptr()) } != 0 {
                continue;
            }
            // SAFETY: the call has succeeded and has filled it; all bytes were zero before.
            if unsafe { old.assume_init() }.sa_sigaction != libc::SIG_DFL {
                continue;
            }
            // SAFETY: an all-zero sigaction is valid: no flags (a call is not restarted), empty mask.
            let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
            action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
            // SAFETY: the handler is a function of the right type that does nothing, so it is safe in
            // a signal's context.
            if unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } == 0 {
                return Ok(signal);
            }
        }
        Err(Errno::EBUSY)
    })
}

/// Lets the signal reach this thread: VMMs start threads with all signals blocked.
fn unblock(signal: libc::c_int) {
    thread_local!(static DONE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) });
    if DONE.replace(true) {
        return;
    }
    let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: `set` is writable and initialised by sigemptyset; the calls change this thread's mask only.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut());
    }
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: libc::time_t::try_from(time.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(i32::try_from(time.subsec_nanos()).unwrap_or(0)),
    }
}

/// Lets the timer go off after `first` and then again and again; not at all where that is 0.
fn set_timer(timer: libc::timer_t, first: Duration) -> Result<(), Errno> {
    let again = if first.is_zero() { first } else { AGAIN };
    let spec = libc::itimerspec { it_value: timespec(first), it_interval: timespec(again) };
    // SAFETY: the timer is one of ours that was not deleted yet; `spec` is readable.
    match unsafe { libc::timer_settime(timer, 0, &raw const spec, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

/// A thread's own timer. Made at its first call, because making one costs more than all else here.
struct OwnTimer(libc::timer_t);

impl Drop for OwnTimer {
    fn drop(&mut self) {
        // SAFETY: the thread ends, so none of its calls is under way, and nobody else knows the timer.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// The timer that is aimed at this thread.
fn own_timer() -> Result<libc::timer_t, Errno> {
    thread_local!(static TIMER: RefCell<Option<OwnTimer>> = const { RefCell::new(None) });
    TIMER.with_borrow_mut(|own| {
        if let Some(OwnTimer(timer)) = own {
            return Ok(*timer);
        }
        let timer = create_timer()?;
        *own = Some(OwnTimer(timer));
        Ok(timer)
    })
}

fn create_timer() -> Result<libc::timer_t, Errno> {
    let signal = signal()?;
    unblock(signal);
    // SAFETY: an all-zero sigevent is valid.
    let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = signal;
    // SAFETY: gettid has no conditions.
    event.sigev_notify_thread_id = unsafe { libc::gettid() };
    let mut timer = MaybeUninit::<libc::timer_t>::zeroed();
    // SAFETY: both pointers are valid; the signal has a handler, so that it does not end the process.
    match unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, timer.as_mut_ptr()) } {
        // SAFETY: the call has succeeded and has filled it.
        0 => Ok(unsafe { timer.assume_init() }),
        _ => Err(last_errno()),
    }
}

/// Takes a call off the list, and stops its timer.
struct Registered<'a> {
    alarm: &'a Alarm,
    number: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        let mut calls = self.alarm.lock();
        if let Some(at) = calls.active.iter().position(|a| a.number == self.number) {
            let ended = calls.active.swap_remove(at);
            // Under the lock, so that nobody starts it again. It cannot fail with these values.
            let _ = set_timer(ended.timer, Duration::ZERO);
        }
    }
}

impl Alarm {
    fn lock(&self) -> std::sync::MutexGuard<'_, Calls> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often it was rung until now, for [`call_since`](Self::call_since).
    pub(crate) fn rings(&self) -> u64 {
        self.lock().rings
    }

    /// Makes `call` until it gives something else than EINTR by a signal of somebody else's, at most
    /// for `timeout`. `call` makes no other such call: a thread has one timer.
    ///
    /// # Errors
    /// The call's own, or how it was ended.
    pub(crate) fn call<T>(
        &self,
        timeout: Duration,
        call: impl FnMut() -> Result<T, Errno>,
    ) -> Result<T, CallError> {
        self.make(None, timeout, call)
    }

    /// The same as a part of something that began when it had been rung `rings` times: a ring since then
    /// ends this call too, whether it comes before or while the call is made.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub(crate) fn call_since<T>(
        &self,
        rings: u64,
        timeout: Duration,
        call: impl FnMut() -> Result<T, Errno>,
    ) -> Result<T, CallError> {
        self.make(Some(rings), timeout, call)
    }

    fn make<T>(
        &self,
        rings: Option<u64>,
        timeout: Duration,
        mut call: impl FnMut() -> Result<T, Errno>,
    ) -> Result<T, CallError> {
        let timeout = timeout.max(Duration::from_millis(1));
        let interrupted = Arc::new(AtomicBool::new(false));
        let until = Instant::now() + timeout;
        let _registered = self.register(rings, timeout, &interrupted)?;
        loop {
            match call() {
                Err(Errno::EINTR) if interrupted.load(Ordering::Acquire) => {
                    return Err(CallError::Interrupted);
                }
                Err(Errno::EINTR) if Instant::now() >= until => return Err(CallError::TimedOut),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(CallError::Errno(errno)),
                Ok(value) => return Ok(value),
            }
        }
    }

    /// Compares the rings, puts a call on the list and starts its timer, all under one lock: a ring in
    /// between would find no call to end, or be forgotten when the timer is set to the timeout.
    fn register(
        &self,
        rings: Option<u64>,
        timeout: Duration,
        interrupted: &Arc<AtomicBool>,
    ) -> Result<Registered<'_>, CallError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let timer = own_timer().map_err(CallError::Errno)?;
        let mut calls = self.lock();
        if rings.is_some_and(|rings| rings != calls.rings) {
            return Err(CallError::Interrupted);
        }
        set_timer(timer, timeout).map_err(CallError::Errno)?;
        calls.active.push(Active { number, timer, interrupted: Arc::clone(interrupted) });
        Ok(Registered { alarm: self, number })
    }

    /// Ends every call that is under way now, and those to come of what began before now. Never blocks
    /// for longer than a lock that is held for a few instructions.
    pub(crate) fn ring(&self) {
        let mut calls = self.lock();
        calls.rings = calls.rings.wrapping_add(1);
        for active in &calls.active {
            active.interrupted.store(true, Ordering::Release);
            // The timer is on the list, so its thread is in a call and has not ended.
            let _ = set_timer(active.timer, Duration::from_nanos(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn blocked_read(alarm: &Alarm, timeout: Duration) -> Result<usize, CallError> {
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        alarm.call(timeout, || {
            rustix::io::read(reader.as_fd(), &mut [0; 8]).map_err(super::super::ioctl::errno)
        })
    }

    #[test]
    fn a_read_that_blocks_ends_when_its_time_is_up() {
        assert_eq!(blocked_read(&Alarm::default(), Duration::from_millis(5)), Err(CallError::TimedOut));
    }

    #[test]
    fn a_read_that_blocks_is_ended_by_another_thread() {
        let alarm = Alarm::default();
        let other = alarm.clone();
        let ender = std::thread::spawn(move || {
            while other.lock().active.is_empty() {
                std::thread::yield_now();
            }
            other.ring();
        });
        assert_eq!(blocked_read(&alarm, Duration::from_secs(60)), Err(CallError::Interrupted));
        ender.join().unwrap();
        assert!(alarm.lock().active.is_empty());
    }

    #[test]
    fn a_ring_that_comes_while_a_call_begins_is_not_lost() {
        let (alarm, stop) = (Alarm::default(), Arc::new(AtomicBool::new(false)));
        let (other, stopped) = (alarm.clone(), Arc::clone(&stop));
        let ringer = std::thread::spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                // Only the first ring of a call counts here: a second one would hide that it was lost.
                let calls = other.lock();
                if let Some(call) = calls.active.first().filter(|a| !a.interrupted.load(Ordering::Acquire)) {
                    call.interrupted.store(true, Ordering::Release);
                    let _ = set_timer(call.timer, Duration::from_nanos(1));
                }
            }
        });
        for _ in 0..2000 {
            let ended = blocked_read(&alarm, Duration::from_secs(60));
            assert_eq!(ended, Err(CallError::Interrupted));
        }
        stop.store(true, Ordering::Release);
        ringer.join().unwrap();
    }

    #[test]
    fn a_signal_of_somebody_else_does_not_end_a_call() {
        let alarm = Alarm::default();
        let mut times = 0;
        let result = alarm.call(Duration::from_secs(60), || {
            times += 1;
            if times < 4 { Err(Errno::EINTR) } else { Ok(times) }
        });
        assert_eq!(result, Ok(4));
    }

    // K-GIVE-UP
    #[test]
    fn a_ring_between_two_calls_ends_the_next_one_and_nothing_that_begins_later() {
        let alarm = Alarm::default();
        let rings = alarm.rings();
        assert_eq!(alarm.call_since(rings, Duration::from_secs(60), || Ok(1)), Ok(1));
        alarm.ring();
        let mut made = false;
        let next = alarm.call_since(rings, Duration::from_secs(60), || {
            made = true;
            Ok(2)
        });
        assert_eq!((next, made), (Err(CallError::Interrupted), false));
        assert!(alarm.lock().active.is_empty());
        assert_eq!(alarm.call_since(alarm.rings(), Duration::from_secs(60), || Ok(3)), Ok(3));
        assert_eq!(alarm.call(Duration::from_secs(60), || Ok(4)), Ok(4));
    }

    // K-GIVE-UP
    #[test]
    fn a_ring_is_never_lost_between_what_it_was_compared_with_and_the_call() {
        let alarm = Alarm::default();
        for _ in 0..500 {
            let rings = alarm.rings();
            let other = alarm.clone();
            // One ring only, at any moment from before the call to in the middle of it.
            let ringer = std::thread::spawn(move || other.ring());
            let (reader, _writer) = rustix::pipe::pipe().unwrap();
            let ended = alarm.call_since(rings, Duration::from_secs(60), || {
                rustix::io::read(reader.as_fd(), &mut [0; 8]).map_err(super::super::ioctl::errno)
            });
            assert_eq!(ended, Err(CallError::Interrupted));
            ringer.join().unwrap();
        }
    }

    #[test]
    fn an_error_of_the_call_is_handed_on() {
        let result: Result<(), _> = Alarm::default().call(Duration::from_secs(60), || Err(Errno::ENOMSG));
        assert_eq!(result, Err(CallError::Errno(Errno::ENOMSG)));
    }
}
