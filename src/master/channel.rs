//! The master's side of the handover channel.

use std::os::fd::{AsFd, OwnedFd};

use reuseportd_core::{Event, GroupId, ListenerId, Order, WorkerId};
use reuseportd_sys::socket;
use reuseportd_wire::channel::{ChannelError, DATAGRAM_BYTES_MAX, FromWorker, ToWorker};

use super::Shell;
use super::place::check_bound;
use super::process::printable;

/// Messages handled before others have their turn.
const TURN: usize = 16;

impl Shell {
    /// Reads what a worker says.
    pub(super) fn read_channel(&mut self, worker: WorkerId) {
        let mut buffer = [0; DATAGRAM_BYTES_MAX + 1];
        for _ in 0..TURN {
            let Some(process) = self.processes.get_mut(&worker) else { return };
            let Some(channel) = &process.channel else { return };
            match socket::recv_with_fds(channel.as_fd(), &mut buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Ok(received) if received.bytes > 0 => {
                    let message = FromWorker::decode(buffer.get(..received.bytes).unwrap_or_default());
                    self.heard(worker, message, received.fds);
                }
                // It ended with orders unread; what it said before still waits behind this.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
                // What it sent did not arrive, which it can't know: it would wait for its order, and so would we.
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                    self.set_wrong(worker, error.to_string());
                    self.inbox.push_back(Event::Ready { worker, listeners: Vec::new() });
                }
                // Its end is closed, or beyond use: an unmodified worker never had a use for it.
                Ok(_) | Err(_) => {
                    process.channel = None;
                    return;
                }
            }
        }
    }

    fn heard(&mut self, worker: WorkerId, message: Result<FromWorker, ChannelError>, mut fds: Vec<OwnedFd>) {
        if !matches!(message, Ok(FromWorker::Ready(_))) {
            socket::close_received(std::mem::take(&mut fds));
        }
        match message {
            Ok(FromWorker::Ready(names)) => {
                let listeners = self.take_bound(worker, &names, fds);
                self.inbox.push_back(Event::Ready { worker, listeners });
            }
            Ok(FromWorker::Drained) => self.inbox.push_back(Event::Drained { worker }),
            Ok(FromWorker::Taken { name, count }) => {
                if let Some(listener) = self.taking.remove(&(worker, name)) {
                    self.inbox.push_back(Event::Taken { listener, count });
                }
            }
            Ok(FromWorker::Error(text)) => {
                let text = printable(&text);
                tracing::warn!(worker = worker.0, text, "a worker reports an error");
                if let Some(process) = self.processes.get_mut(&worker) {
                    process.detail = Some(text);
                }
            }
            Ok(FromWorker::Unknown(verb)) => {
                tracing::warn!(worker = worker.0, verb = printable(&verb), "a worker does not know an order");
            }
            Err(ChannelError::UnknownVerb(verb)) => self.say(worker, &ToWorker::Unknown(verb), None),
            Err(error) => tracing::warn!(worker = worker.0, %error, "a worker's message is not understood"),
        }
    }

    /// Takes in the sockets of a `ready`. One that can't serve is left out, and the worker is found wanting.
    fn take_bound(
        &mut self,
        worker: WorkerId,
        names: &[String],
        fds: Vec<OwnedFd>,
    ) -> Vec<(GroupId, ListenerId)> {
        let mut listeners = Vec::new();
        if names.len() != fds.len() {
            self.set_wrong(
                worker,
                format!("its ready names {} listeners and carries {}", names.len(), fds.len()),
            );
            socket::close_received(fds);
            return listeners;
        }
        for (name, fd) in names.iter().zip(fds) {
            let named =
                self.launch_of(worker).and_then(|launch| launch.listeners().find(|(_, l)| l.name == *name));
            let Some((group, bound)) = named.map(|(group, listen)| (group, check_bound(fd.as_fd(), listen)))
            else {
                self.set_wrong(
                    worker,
                    format!("its ready names the listener {name:?}, which is not configured"),
                );
                socket::close_received(vec![fd]);
                continue;
            };
            let taken = match bound.and_then(|bound| self.note_bound(group, bound)) {
                Ok(()) => self.listeners.add(group, worker, None, fd).map_err(|error| error.to_string()),
                Err(what) => {
                    socket::close_received(vec![fd]);
                    Err(what)
                }
            };
            match taken {
                Ok(listener) => listeners.push((group, listener)),
                Err(what) => self.set_wrong(worker, format!("its listener {name:?}: {what}")),
            }
        }
        listeners
    }

    fn set_wrong(&mut self, worker: WorkerId, text: String) {
        if let Some(process) = self.processes.get_mut(&worker) {
            process.detail = Some(text);
        }
    }

    /// Gives an order.
    pub(super) fn tell(&mut self, worker: WorkerId, order: Order) {
        match order {
            Order::Serve => self.say(worker, &ToWorker::Serve, None),
            Order::Stop => self.say(worker, &ToWorker::Stop, None),
            Order::Take(listener) => {
                let group = self.listeners.of(listener).map(|listener| listener.group);
                let launch = self.launch_of(worker);
                let known = launch.and_then(|launch| launch.listeners().find(|(of, _)| Some(*of) == group));
                let Some(name) = known.map(|(_, listen)| listen.name.clone()) else { return };
                self.taking.insert((worker, name.clone()), listener);
                self.say(worker, &ToWorker::Take(name), Some(listener));
            }
        }
    }

    fn say(&self, worker: WorkerId, message: &ToWorker, listener: Option<ListenerId>) {
        let channel = self.processes.get(&worker).and_then(|process| process.channel.as_ref());
        let (Some(channel), Ok(text)) = (channel, message.encode()) else { return };
        let handle = listener.and_then(|listener| self.listeners.handle(listener));
        let fds: Vec<_> = handle.into_iter().collect();
        // A worker that does not listen misses orders, and is dealt with at its deadline.
        if let Err(error) = socket::send_with_fds(channel.as_fd(), text.as_bytes(), &fds) {
            tracing::warn!(worker = worker.0, %error, "cannot speak to a worker");
        }
    }
}
