//! The notify socket of the workers: READY=1 and the rest, believed only from a worker's own processes.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use reuseportd_core::{Event, WorkerId};
use reuseportd_sys::{procfs, socket};
use reuseportd_wire::notify::{self, Notification};

use super::Shell;
use super::process::printable;

/// Datagrams handled before others have their turn: a flood must not keep the master from its work.
const TURN: usize = 512;
/// Longest datagram understood, in bytes.
const DATAGRAM_BYTES_MAX: usize = 4096;
/// Longest STATUS= kept, in characters.
const STATUS_CHARS_MAX: usize = 200;
/// Generations of processes between a sender and its worker.
const ANCESTORS_MAX: usize = 32;

/// The text of `STATUS=` as it is kept.
pub(super) fn shown(status: &str) -> String {
    printable(status).chars().take(STATUS_CHARS_MAX).collect()
}

impl Shell {
    /// Reads what has come on the notify socket.
    pub(super) fn read_notifications(&mut self) {
        let mut buffer = [0; DATAGRAM_BYTES_MAX];
        // Whom a stranger descends from is looked up once in a turn, and not with each datagram of a flood.
        let mut strangers = BTreeSet::new();
        for _ in 0..TURN {
            let (length, sender) = match socket::recv_with_credentials(self.notify.as_fd(), &mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.notify_rejected += 1;
                    if let Some(untold) = self.rejections.again() {
                        tracing::warn!(%error, untold, "a notification is not understood: ignored");
                    }
                    continue;
                }
            };
            let known = (!strangers.contains(&sender.pid)).then(|| self.worker_of(sender.pid)).flatten();
            let Some(worker) = known else {
                strangers.insert(sender.pid);
                self.notify_rejected += 1;
                if let Some(untold) = self.rejections.again() {
                    tracing::warn!(
                        pid = sender.pid,
                        uid = sender.uid,
                        untold,
                        "a notification from no worker's process: ignored"
                    );
                }
                continue;
            };
            for said in notify::decode(buffer.get(..length).unwrap_or_default()) {
                self.notification(worker, said);
            }
        }
    }

    fn notification(&mut self, worker: WorkerId, said: Notification) {
        let event = match said {
            Notification::Ready => Event::Notified { worker },
            Notification::Extend(by) => Event::Extended { worker, by },
            Notification::Alive => Event::Alive { worker },
            Notification::Stuck => Event::Stuck { worker },
            Notification::Status(text) => {
                if let Some(process) = self.processes.get_mut(&worker) {
                    process.status = Some(shown(&text));
                }
                return;
            }
        };
        self.inbox.push_back(event);
    }

    /// The worker a process belongs to: by its process group, or by descent.
    fn worker_of(&self, pid: i32) -> Option<WorkerId> {
        let mut pid = pid;
        for _ in 0..ANCESTORS_MAX {
            let process = procfs::process(pid).ok();
            let group = process.as_ref().map_or(pid, |process| process.group);
            let found = self.processes.iter().find(|(_, worker)| worker.pid == pid || worker.pid == group);
            if let Some((worker, _)) = found {
                return Some(*worker);
            }
            pid = process?.parent;
            if pid <= 1 {
                return None;
            }
        }
        None
    }
}
