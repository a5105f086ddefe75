//! A relay between `send` and `receive` that damages one frame on its way to the destination: it ends all
//! connections within it, or changes one bit of it.
//!
//! Only the length of each frame is looked at for passing it on; its type and number say whether it is
//! the one to damage.

use airlift_stream::{FrameHeader, FrameType, HEADER_LEN, Limits};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// What is done to the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Damage {
    /// Only so many of its bytes pass, and nothing after them in any direction.
    CutAfter(usize),
    /// The lowest bit of this byte is changed; its header has 40 bytes, and then comes its payload.
    Flip(usize),
}

/// One frame, and what is done to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) kind: FrameType,
    /// How many of its type come before it.
    pub(crate) number: usize,
    pub(crate) damage: Damage,
}

#[derive(Debug, Default)]
struct Shared {
    ends: Vec<TcpStream>,
    cut: bool,
    /// Frames of the wanted type that have come, and the bytes of their payloads.
    seen: usize,
    bytes_before: u64,
    placed: bool,
}

/// A running relay.
#[derive(Debug)]
pub(crate) struct Relay {
    port: u16,
    shared: Arc<Mutex<Shared>>,
}

impl Relay {
    /// Relays to `uri`, which is of TCP on loopback.
    pub(crate) fn start(uri: &str, fault: Fault) -> Self {
        let to = uri.strip_prefix("tcp:").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Mutex::new(Shared::default()));
        let state = Arc::clone(&shared);
        // Ends with the process; what it waits for is bounded by those whom it connects.
        thread::spawn(move || {
            for near in listener.incoming() {
                let (near, far) = (near.unwrap(), TcpStream::connect(&to));
                let mut shared = state.lock().unwrap();
                let Ok(far) = far else { continue };
                if shared.cut {
                    return;
                }
                let clone = |stream: &TcpStream| stream.try_clone().unwrap();
                shared.ends.extend([clone(&near), clone(&far)]);
                let (back_from, back_to) = (clone(&far), clone(&near));
                thread::spawn(move || pass(back_from, back_to));
                let state = Arc::clone(&state);
                thread::spawn(move || forward(near, far, fault, &state));
            }
        });
        Self { port, shared }
    }

    pub(crate) fn uri(&self) -> String {
        format!("tcp:127.0.0.1:{}", self.port)
    }

    /// Whether the frame came, and was damaged.
    pub(crate) fn was_placed(&self) -> bool {
        self.shared.lock().unwrap().placed
    }

    /// Bytes of the payloads of the frames of the same type that came before it.
    pub(crate) fn bytes_before(&self) -> u64 {
        self.shared.lock().unwrap().bytes_before
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream) {
    // Either end may go at any time.
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}

fn forward(mut from: TcpStream, mut to: TcpStream, fault: Fault, shared: &Mutex<Shared>) {
    while let Some((header, mut frame)) = read_frame(&mut from) {
        if let Some(damage) = due(header, fault, shared) {
            match damage {
                Damage::Flip(at) => frame[at] ^= 1,
                Damage::CutAfter(bytes) => {
                    let _ = to.write_all(&frame[..bytes]);
                    let shared = shared.lock().unwrap();
                    for end in &shared.ends {
                        let _ = end.shutdown(Shutdown::Both);
                    }
                    return;
                }
            }
        }
        if to.write_all(&frame).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}

fn due(header: FrameHeader, fault: Fault, shared: &Mutex<Shared>) -> Option<Damage> {
    let mut shared = shared.lock().unwrap();
    if header.kind != fault.kind || shared.placed {
        return None;
    }
    shared.seen += 1;
    if shared.seen <= fault.number {
        shared.bytes_before += u64::from(header.length);
        return None;
    }
    shared.placed = true;
    shared.cut = matches!(fault.damage, Damage::CutAfter(_));
    Some(fault.damage)
}

fn read_frame(from: &mut TcpStream) -> Option<(FrameHeader, Vec<u8>)> {
    let mut frame = vec![0; HEADER_LEN];
    from.read_exact(&mut frame).ok()?;
    let header = FrameHeader::decode(frame.first_chunk().unwrap(), Limits::default()).unwrap();
    frame.resize(HEADER_LEN + usize::try_from(header.length).unwrap(), 0);
    from.read_exact(&mut frame[HEADER_LEN..]).ok()?;
    Some((header, frame))
}
