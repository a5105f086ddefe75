//! Sessions over pipes and socket pairs, which answer reads and writes as drivers do.

use super::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};

fn manner(data_timeout: Duration) -> Manner {
    let options = VfioOptions { data_timeout, ..VfioOptions::default() };
    Manner { alarm: Alarm::default(), options, reinit: false }
}

/// Long enough that only a failure waits for it.
const LONG: Duration = Duration::from_secs(60);

fn file(fd: impl Into<OwnedFd>, direction: Direction, state: DeviceState) -> Arc<DataFile> {
    Arc::new(DataFile::new(fd.into(), direction, state, manner(LONG)))
}

fn data(len: usize) -> Piece {
    Piece::Data { len, chunk: Chunk::Stream }
}

/// A socket pair of which the first end is the session's.
fn pair() -> (UnixStream, UnixStream) {
    UnixStream::pair().unwrap()
}

// V2-ENOMSG, V2-END
#[test]
fn v2_enomsg_and_v2_end_what_an_answer_means_depends_on_the_state() {
    let enomsg = || Err(CallError::Errno(Errno::ENOMSG));
    for state in [DeviceState::PreCopy, DeviceState::PreCopyP2p] {
        assert_eq!(meaning(state, Ok(0)), Ok(Piece::Drained), "mtty answers so");
        assert_eq!(meaning(state, enomsg()), Ok(Piece::Drained));
        assert_eq!(meaning(state, Ok(3)), Ok(data(3)));
    }
    assert_eq!(meaning(DeviceState::StopCopy, Ok(0)), Ok(Piece::End));
    let error = meaning(DeviceState::StopCopy, enomsg()).unwrap_err();
    assert_eq!((error.kind, error.errno), (DeviceErrorKind::Protocol, Some(Errno::ENOMSG)));
    let error = meaning(DeviceState::PreCopy, Err(CallError::Errno(Errno::ENODEV))).unwrap_err();
    assert_eq!(error.kind, DeviceErrorKind::Lost);
    assert!(error.message.contains("reset under the session"), "{error}");
}

// V2-SHORT
#[test]
fn v2_short_one_session_goes_from_pre_copy_to_the_end_in_short_reads() {
    let (ours, mut theirs) = pair();
    let file = file(ours, Direction::Save, DeviceState::PreCopy);
    let mut session = Save(Arc::clone(&file));
    let mut buf = [0; 16];
    theirs.write_all(b"abc").unwrap();
    assert_eq!(session.read(&mut buf), Ok(data(3)));
    assert_eq!(&buf[..3], b"abc");
    theirs.write_all(b"defg").unwrap();
    drop(theirs);
    assert!(file.moved(DeviceState::StopCopy));
    assert_eq!(session.read(&mut buf[..2]), Ok(data(2)));
    assert_eq!(session.read(&mut buf), Ok(data(2)));
    assert_eq!(session.read(&mut buf), Ok(Piece::End));
    assert_eq!(session.read(&mut buf), Ok(Piece::End), "stays so");
    assert_eq!(session.read(&mut []).unwrap_err().kind, DeviceErrorKind::Misuse);
}

#[test]
fn in_pre_copy_nothing_is_not_the_end() {
    let (ours, theirs) = pair();
    drop(theirs);
    let file = file(ours, Direction::Save, DeviceState::PreCopyP2p);
    let mut session = Save(Arc::clone(&file));
    assert_eq!(session.read(&mut [0; 4]), Ok(Piece::Drained));
    assert_eq!(session.read(&mut [0; 4]), Ok(Piece::Drained));
    file.moved(DeviceState::StopCopy);
    assert_eq!(session.read(&mut [0; 4]), Ok(Piece::End));
}

#[test]
fn a_driver_that_says_again_is_waited_for() {
    let (ours, mut theirs) = pair();
    let mut session = Save(file(ours, Direction::Save, DeviceState::StopCopy));
    let reader = std::thread::spawn(move || session.read(&mut [0; 8]));
    theirs.write_all(b"late").unwrap();
    assert_eq!(reader.join().unwrap(), Ok(data(4)));
}

// V2-POLL
#[test]
fn v2_poll_a_driver_that_is_always_ready_and_never_gives_anything_is_not_asked_all_the_time() {
    let (ours, mut theirs) = pair();
    theirs.write_all(b"x").unwrap();
    let mut asked = 0;
    let answer = manner(Duration::from_millis(200)).transfer(0, ours.as_fd(), PollFlags::IN, || {
        asked += 1;
        Err(rustix::io::Errno::AGAIN)
    });
    assert_eq!(answer, Err(CallError::TimedOut));
    // Without pauses it would be asked some hundred thousand times.
    assert!((2..200).contains(&asked), "{asked} times");
}

#[test]
fn a_session_that_was_given_up_is_over_and_says_why() {
    let (ours, theirs) = pair();
    let file = Arc::new(DataFile::new(
        ours.into(),
        Direction::Save,
        DeviceState::StopCopy,
        manner(Duration::from_millis(5)),
    ));
    let mut session = Save(file);
    let error = session.read(&mut [0; 8]).unwrap_err();
    assert_eq!((error.kind, error.errno), (DeviceErrorKind::TimedOut, Some(Errno::ETIMEDOUT)));
    drop(theirs);
    let again = session.read(&mut [0; 8]).unwrap_err();
    assert_eq!(again.kind, DeviceErrorKind::TimedOut, "not the end of the data");
    assert!(again.message.contains("did not answer in time"), "{again}");
}

#[test]
fn a_read_that_waits_is_ended_from_outside() {
    let (ours, _theirs) = pair();
    let file = file(ours, Direction::Save, DeviceState::StopCopy);
    let alarm = file.manner.alarm.clone();
    let mut session = Save(file);
    let reader = std::thread::spawn(move || session.read(&mut [0; 8]));
    while !reader.is_finished() {
        alarm.ring();
        std::thread::yield_now();
    }
    assert_eq!(reader.join().unwrap().unwrap_err().kind, DeviceErrorKind::Interrupted);
}

// V2-AFTER-END
#[test]
fn v2_after_end_a_session_that_the_device_has_left_is_closed_and_refused() {
    let (ours, mut theirs) = pair();
    let file = file(ours, Direction::Save, DeviceState::StopCopy);
    let mut session = Save(Arc::clone(&file));
    assert!(!file.moved(DeviceState::Stop));
    assert_eq!(theirs.read(&mut [0; 1]).unwrap(), 0, "the descriptor is closed");
    let error = session.read(&mut [0; 8]).unwrap_err();
    assert_eq!((error.kind, error.errno), (DeviceErrorKind::Misuse, None));
    assert_eq!(session.precopy_info().unwrap_err().kind, DeviceErrorKind::Misuse);
}

#[test]
fn a_session_that_is_dropped_is_closed_while_the_device_stays() {
    let (ours, mut theirs) = pair();
    let file = file(ours, Direction::Load, DeviceState::Resuming);
    drop(Load(Arc::clone(&file)));
    assert_eq!(theirs.read(&mut [0; 1]).unwrap(), 0);
}

// V2-PRECOPY-INFO
#[test]
fn v2_precopy_info_is_asked_in_pre_copy_and_may_not_be_there() {
    let (ours, _theirs) = pair();
    let file = file(ours, Direction::Save, DeviceState::PreCopy);
    let mut session = Save(Arc::clone(&file));
    // A socket knows the request as little as an old driver.
    assert_eq!(session.precopy_info(), Ok(None));
    assert_eq!(session.precopy_info(), Ok(None));
    file.moved(DeviceState::StopCopy);
    assert_eq!(session.precopy_info().unwrap_err().kind, DeviceErrorKind::Misuse);
}

// V2-SHORT
#[test]
fn v2_short_a_write_that_fills_the_driver_goes_on_when_there_is_room() {
    let (ours, mut theirs) = pair();
    let mut session = Load(file(ours, Direction::Load, DeviceState::Resuming));
    let sent: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    let read = Arc::new(AtomicUsize::new(0));
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        theirs.read_to_end(&mut all).unwrap();
        read.store(all.len(), Ordering::Relaxed);
        all
    });
    session.begin_chunk(0).unwrap();
    session.write(&sent).unwrap();
    session.end_chunk().unwrap();
    drop(session);
    assert!(reader.join().unwrap() == sent, "every byte in its order");
}

// V2-WRITE-FINAL
#[test]
fn v2_write_final_after_an_error_the_driver_is_not_asked_again() {
    let (ours, theirs) = pair();
    let file = file(ours, Direction::Load, DeviceState::Resuming);
    let mut session = Load(Arc::clone(&file));
    assert_eq!(file.load_failure(), None);
    drop(theirs);
    let error = session.write(b"state").unwrap_err();
    assert_eq!(error.errno, Some(Errno::EPIPE));
    for again in [session.write(b"more").unwrap_err(), session.end_chunk().unwrap_err()] {
        assert_eq!(again.errno, Some(Errno::EPIPE));
        assert!(again.message.contains("failed before"), "{again}");
    }
    drop(session);
    assert_eq!(file.load_failure(), Some(error), "known after the session too");
}

#[test]
fn a_write_ends_from_outside_between_two_calls_too() {
    let (ours, _theirs) = pair();
    let file = file(ours, Direction::Load, DeviceState::Resuming);
    let alarm = file.manner.alarm.clone();
    let mut session = Load(file);
    let writer = std::thread::spawn(move || session.write(&vec![0; 64 << 20]));
    while !writer.is_finished() {
        alarm.ring();
        std::thread::yield_now();
    }
    assert_eq!(writer.join().unwrap().unwrap_err().kind, DeviceErrorKind::Interrupted);
}
