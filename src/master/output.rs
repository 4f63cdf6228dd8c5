//! What workers print: read from their pipes, tagged, and passed on line by line.

use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use reuseportd_sys::pipe;
use rustix::pipe::fcntl_setpipe_size;
use serde::{Deserialize, Serialize};

use super::carried::{Carried, LogPipe};
use super::log::{ATOMIC_BYTES, Patient};
use super::process::{LastLines, printable};

/// What the kernel keeps of a worker's output while the master is busy, or gone.
const PIPE_BYTES: usize = 1 << 20;
/// How much of one worker's output is handled before others have their turn.
const TURN_BYTES: usize = 1 << 16;

/// The reading end of a worker's stdout and stderr.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Output {
    pipe: Carried<LogPipe>,
    tag: String,
    /// The beginning of a line whose end has not come yet.
    rest: Vec<u8>,
}

impl Output {
    /// A pipe: the master's end, and the end for the worker.
    pub(super) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
        let (reader, writer) = pipe::log_pipe()?;
        // Less is enough where the user's pipe budget is used up.
        let _ = fcntl_setpipe_size(&writer, PIPE_BYTES);
        Ok((reader, writer))
    }

    pub(super) fn of_worker(pipe: OwnedFd, generation: u32, seat: u16, pid: i32) -> Output {
        Output::new(pipe, format!("[g{generation} s{seat} {pid}] "))
    }

    /// Each line is passed on with this before it.
    pub(super) fn new(pipe: OwnedFd, tag: String) -> Output {
        Output { pipe: Carried::new(LogPipe::from(pipe)), tag, rest: Vec::new() }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// Passes on what has come; `false` once nothing will come any more.
    pub(super) fn pass_on(&mut self, last: &mut LastLines) -> bool {
        // Nobody reading the output is no reason to end.
        let write = &mut |line: &[u8]| drop(Patient(rustix::stdio::stdout()).write_all(line));
        let mut buffer = [0; 8192];
        let mut handled = 0;
        while handled < TURN_BYTES {
            match rustix::io::read(self.fd(), &mut buffer) {
                Ok(0) => {
                    self.flush(last, write);
                    return false;
                }
                Ok(count) => {
                    handled += count;
                    self.take(buffer.get(..count).unwrap_or_default(), last, write);
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return true,
                Err(_) => return false,
            }
        }
        true
    }

    /// The same of a process that has ended: all there is, and not only what one turn allows. (A child of it may go on.)
    pub(super) fn pass_on_rest(&mut self, last: &mut LastLines) -> bool {
        (0..PIPE_BYTES / TURN_BYTES).all(|_| self.pass_on(last))
    }

    fn take(&mut self, bytes: &[u8], last: &mut LastLines, write: &mut dyn FnMut(&[u8])) {
        // A line too long to be written at once is passed on in pieces.
        let longest = ATOMIC_BYTES.saturating_sub(self.tag.len() + 1).max(1);
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            for piece in line.chunks(longest) {
                if self.rest.len() + piece.len() > longest {
                    self.flush(last, write);
                }
                self.rest.extend_from_slice(piece);
                if piece.ends_with(b"\n") {
                    self.flush(last, write);
                }
            }
        }
    }

    fn flush(&mut self, last: &mut LastLines, write: &mut dyn FnMut(&[u8])) {
        if self.rest.is_empty() {
            return;
        }
        let line = self.rest.strip_suffix(b"\n").unwrap_or(&self.rest);
        last.push(line);
        let mut tagged = self.tag.clone().into_bytes();
        if io::stdout().is_terminal() {
            tagged.extend_from_slice(printable(&String::from_utf8_lossy(line)).as_bytes());
        } else {
            tagged.extend_from_slice(line);
        }
        tagged.push(b'\n');
        write(&tagged);
        self.rest.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_at_once_fits() {
        let (reader, _writer) = Output::pipe().unwrap();
        let mut output = Output::new(reader, "[g1 s0 7] ".into());
        let mut pieces = Vec::new();
        for printed in [&b"short\nlong "[..], &[b'x'; 9000], b" end\n\n"] {
            output.take(printed, &mut LastLines::default(), &mut |line| pieces.push(line.to_vec()));
        }
        assert!(pieces.iter().all(|piece| piece.len() <= ATOMIC_BYTES && piece.starts_with(b"[g1 s0 7] ")));
        let text: Vec<u8> = pieces.iter().flat_map(|piece| &piece[10..piece.len() - 1]).copied().collect();
        assert_eq!(text, [b"shortlong ", &[b'x'; 9000][..], b" end"].concat());
    }
}
