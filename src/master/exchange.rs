//! One HTTP request to prove a worker, over a connection that it has accepted.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use reuseportd_core::{Event, Verdict, WorkerId};
use reuseportd_wire::status::Protocol;
use socket2::Socket;

use super::Shell;
use crate::config::{Config, Listen, ReadinessMethod};

/// Longest head of an answer that is read, in bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// A request on its way.
#[derive(Debug)]
pub(super) struct Exchange {
    connection: Socket,
    head: Vec<u8>,
}

/// Whether workers of this config are proven by requests.
pub(super) fn is_asked(config: &Config) -> bool {
    config.readiness.method == ReadinessMethod::Http
}

/// The request.
pub(super) fn request(path: &str, listen: &[Listen]) -> String {
    let first = listen.iter().find(|listen| listen.protocol == Protocol::Tcp);
    let host = first.map_or_else(String::new, |listen| listen.address.to_string());
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: reuseportd/{version}\r\nConnection: close\r\n\r\n"
    )
}

impl Exchange {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// Reads what has come; the verdict once there is one.
    fn read(&mut self) -> Option<Verdict> {
        let mut buffer = [0; 4096];
        loop {
            match self.connection.read(&mut buffer) {
                Ok(0) => return Some(judge(&self.head)),
                Ok(count) => self.head.extend_from_slice(buffer.get(..count)?),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Some(Verdict::Failed),
            }
            // The head is enough, wherever the body ends.
            if self.head.windows(4).any(|end| end == b"\r\n\r\n") || self.head.len() > HEAD_BYTES_MAX {
                return Some(judge(&self.head));
            }
        }
    }
}

/// 2xx passes.
pub(super) fn judge(head: &[u8]) -> Verdict {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let is_good = line.starts_with(b"HTTP/1.") && line.get(8..10) == Some(b" 2") && line.len() >= 12;
    if is_good { Verdict::Passed } else { Verdict::Failed }
}

impl Shell {
    /// Sends a request; its answer comes as an event.
    pub(super) fn ask(&mut self, worker: WorkerId, mut connection: Socket, request: &str) -> Verdict {
        match connection.write_all(request.as_bytes()) {
            Ok(()) => {
                self.exchanges.insert(worker, Exchange { connection, head: Vec::new() });
                Verdict::Waiting
            }
            Err(_) => Verdict::Failed,
        }
    }

    /// An answer, or a part of it.
    pub(super) fn read_exchange(&mut self, worker: WorkerId) {
        let Some(verdict) = self.exchanges.get_mut(&worker).and_then(Exchange::read) else { return };
        if let (Verdict::Failed, Some(exchange)) = (verdict, self.exchanges.get(&worker)) {
            let line = exchange.head.split(|byte| *byte == b'\r').next().unwrap_or_default();
            let line = super::process::printable(&String::from_utf8_lossy(line.get(..80).unwrap_or(line)));
            self.set_detail(worker, Some(format!("it answered the readiness request with {line:?}")));
        }
        self.exchanges.remove(&worker);
        self.inbox.push_back(Event::Proved { worker, verdict });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_2xx_passes() {
        for (head, passes) in [
            ("HTTP/1.1 200 OK\r\n\r\n", true),
            ("HTTP/1.0 204 \r\n", true),
            ("HTTP/1.1 503 Service Unavailable\r\n\r\n", false),
            ("HTTP/1.1 2", false),
            ("220 mail.example ESMTP\r\n", false),
            ("", false),
        ] {
            assert_eq!(judge(head.as_bytes()) == Verdict::Passed, passes, "{head:?}");
        }
    }
}
