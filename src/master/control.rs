//! The control socket's server: who may speak, what they ask, what they are told.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use reuseportd_core::{Asked, Event, Number, Reason, Seat, StopMode, Ticket, Time, Trigger, Wait};
use reuseportd_sys::socket;
use reuseportd_wire::control::{self, REQUEST_BYTES_MAX, Reply, Request};
use reuseportd_wire::status::{Outcome, Phase};
use serde::{Deserialize, Serialize};

use super::carried::Carried;
use super::reload::Refusal;
use super::seldom::Seldom;
use super::{Shell, clock};

/// Clients at a time. For one more the oldest goes that waits for no outcome; if all do, the new one.
const CLIENTS_MAX: usize = 256;
/// What the spare descriptor is of.
const SPARE: &str = "/dev/null";
/// The pause before those who knock are looked at again, when none of them could even be told why not.
const DEAF: Duration = Duration::from_millis(100);
const NOT_ALLOWED: &str =
    "not allowed: only root, the master's own user and control.allow_users may speak to it";
/// A client that does not read its answers is dropped when so much waits for it.
const UNSENT_BYTES_MAX: usize = control::REPLY_BYTES_MAX;

/// One connection.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Client {
    stream: Carried<UnixStream>,
    request: Vec<u8>,
    unsent: Vec<u8>,
    /// It has its last answer: closed once that is sent.
    is_done: bool,
    /// It waits for an outcome, and sees the progress.
    is_waiting: bool,
}

/// All of them. A client's number is the ticket under which the core knows its wish.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Clients {
    listener: Carried<UnixListener>,
    allowed: Vec<u32>,
    by_number: BTreeMap<u32, Client>,
    last: u32,
    /// Given up when there is no descriptor left for a client.
    #[serde(skip)]
    spare: Option<File>,
    #[serde(skip)]
    deaf_until: Option<Time>,
    #[serde(skip)]
    turned_away: Seldom,
}

impl Clients {
    pub(super) fn new(listener: UnixListener, allow_users: &[u32]) -> Clients {
        let mut allowed = vec![0, rustix::process::geteuid().as_raw()];
        allowed.extend(allow_users);
        Clients {
            listener: Carried::new(listener),
            allowed,
            by_number: BTreeMap::new(),
            last: 0,
            spare: File::open(SPARE).ok(),
            deaf_until: None,
            turned_away: Seldom::default(),
        }
    }

    /// Where they knock; `None` as long as nobody can be let in, nor told why.
    pub(super) fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.deaf_until.is_none().then(|| self.listener.as_fd())
    }

    /// When the loop has to wake up for those who knock.
    pub(super) fn deadline(&self) -> Option<Time> {
        self.deaf_until
    }

    /// Hears again, when the time has come.
    pub(super) fn hear_again(&mut self) {
        self.deaf_until = self.deaf_until.filter(|until| *until > clock::now());
    }

    /// Clients to watch: number, descriptor, whether something is to be sent.
    pub(super) fn fds(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>, bool)> {
        self.by_number
            .iter()
            .map(|(number, client)| (*number, client.stream.as_fd(), !client.unsent.is_empty()))
    }

    /// Takes in those who knock.
    pub(super) fn accept(&mut self) {
        self.spare = self.spare.take().or_else(|| File::open(SPARE).ok());
        // No more in one turn: those let in are heard before others take their places.
        for _ in 0..CLIENTS_MAX {
            match self.listener.accept() {
                Ok((stream, _)) => self.welcome(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.refuse_for(&error),
            }
        }
    }

    /// Who can't be let in would knock for ever, and hear nothing: the spare descriptor is room enough to say why.
    fn refuse_for(&mut self, error: &io::Error) {
        drop(self.spare.take());
        match self.listener.accept() {
            Ok((stream, _)) => {
                self.turn_away(
                    stream,
                    &format!("the master can't let a client in: {error}{}", remedy(error)),
                );
            }
            Err(_) => self.deaf_until = Some(clock::now().after(DEAF)),
        }
    }

    fn welcome(&mut self, stream: UnixStream) {
        let peer = socket::peer_credentials(stream.as_fd());
        if !peer.is_ok_and(|peer| self.allowed.contains(&peer.uid)) {
            return self.turn_away(stream, NOT_ALLOWED);
        }
        if self.by_number.len() >= CLIENTS_MAX && !self.make_room() {
            let why =
                format!("{CLIENTS_MAX} clients wait for outcomes already: ask again when they have them");
            return self.turn_away(stream, &why);
        }
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        self.last += 1;
        let client = Client {
            stream: Carried::new(stream),
            request: Vec::new(),
            unsent: Vec::new(),
            is_done: false,
            is_waiting: false,
        };
        self.by_number.insert(self.last, client);
    }

    /// Who asks nothing, or does not read its answer, keeps nobody out for ever.
    fn make_room(&mut self) -> bool {
        let oldest = self.by_number.iter().find(|(_, client)| !client.is_waiting).map(|(number, _)| *number);
        let Some(client) = oldest.and_then(|number| self.by_number.remove(&number)) else { return false };
        if client.unsent.is_empty() {
            let why = format!("more than {CLIENTS_MAX} clients, and this one has asked for nothing yet");
            self.turn_away(client.stream.into_inner(), &why);
        }
        true
    }

    /// Says why, as far as the client takes it at once, and hangs up.
    fn turn_away(&mut self, mut stream: UnixStream, why: &str) {
        if let Some(untold) = self.turned_away.again() {
            let uid = socket::peer_credentials(stream.as_fd()).map(|peer| peer.uid).ok();
            tracing::warn!(
                event = "client_turned_away",
                uid,
                untold,
                "a control client is turned away: {why}"
            );
        }
        let reply = Reply::Error { message: why.to_owned(), code: 1, receipt: None };
        if let Ok(line) = control::encode(&reply)
            && stream.set_nonblocking(true).is_ok()
        {
            let _ = stream.write_all(line.as_bytes());
        }
    }

    /// Reads from a client; its request once it is whole, or why there will be none.
    fn read(&mut self, number: u32) -> Option<Result<Request, String>> {
        let client = self.by_number.get_mut(&number)?;
        let mut buffer = [0; 4096];
        loop {
            match client.stream.read(&mut buffer) {
                Ok(0) => {
                    self.by_number.remove(&number);
                    return None;
                }
                // One request a connection; what comes after it is not read as another.
                Ok(_) if client.is_waiting || client.is_done => {}
                Ok(count) => client.request.extend_from_slice(buffer.get(..count)?),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.by_number.remove(&number);
                    return None;
                }
            }
            if client.request.contains(&b'\n') || client.request.len() > REQUEST_BYTES_MAX {
                break;
            }
        }
        let end = client.request.iter().position(|byte| *byte == b'\n');
        let is_whole = end.is_some() || client.request.len() > REQUEST_BYTES_MAX;
        if !is_whole || client.is_waiting || client.is_done {
            return None;
        }
        let line: Vec<u8> = client.request.drain(..end.unwrap_or(client.request.len())).collect();
        Some(control::decode_request(&line).map_err(|error| error.to_string()))
    }

    /// Sends an answer, as far as the client takes it now.
    pub(super) fn reply(&mut self, number: u32, reply: &Reply, is_last: bool) {
        let Some(client) = self.by_number.get_mut(&number) else { return };
        match control::encode(reply) {
            Ok(line) => client.unsent.extend_from_slice(line.as_bytes()),
            Err(error) => tracing::error!(%error, "cannot encode an answer"),
        }
        client.is_done |= is_last;
        self.send(number);
    }

    /// Sends what waits for a client.
    pub(super) fn send(&mut self, number: u32) {
        let Some(client) = self.by_number.get_mut(&number) else { return };
        let is_broken = loop {
            if client.unsent.is_empty() {
                break client.is_done;
            }
            match client.stream.write(&client.unsent) {
                Ok(count) => drop(client.unsent.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    break client.unsent.len() > UNSENT_BYTES_MAX;
                }
                Err(_) => break true,
            }
        };
        if is_broken {
            self.by_number.remove(&number);
        }
    }

    /// Tells everybody who waits how far it is.
    pub(super) fn progress(&mut self, state: Phase, text: &str, ready: Option<(u32, u32)>) {
        let reply = Reply::Progress {
            state,
            text: text.to_owned(),
            ready: ready.map(|(ready, _)| ready),
            of: ready.map(|(_, of)| of),
        };
        let waiting: Vec<u32> = self
            .by_number
            .iter()
            .filter(|(_, client)| client.is_waiting)
            .map(|(number, _)| *number)
            .collect();
        for number in waiting {
            self.reply(number, &reply, false);
        }
    }
}

impl Shell {
    /// A client said something, or left.
    pub(super) fn read_client(&mut self, number: u32) {
        let Some(request) = self.clients.read(number) else { return };
        match request {
            Err(message) => {
                self.clients.reply(number, &Reply::Error { message, code: 1, receipt: None }, true)
            }
            Ok(Request::Status {}) => {
                let status = Box::new(self.status());
                self.clients.reply(number, &Reply::Status { status }, true);
            }
            Ok(Request::Upgrade { wait, force }) => {
                self.request_upgrade(number, wait);
                if force {
                    self.inbox.push_back(Event::Hurry);
                }
            }
            Ok(Request::Receipts {}) => {
                let receipts = self.receipts.iter().map(|(_, receipt)| receipt.clone()).collect();
                self.clients.reply(number, &Reply::Receipts { receipts }, true);
            }
            Ok(Request::Rollback { wait }) => {
                let wait = core_wait(wait);
                let asked = self.roll_back(Ticket(number), wait);
                self.taken(number, asked, wait.is_some());
            }
            Ok(Request::Scale { workers, wait }) => {
                let workers = u16::try_from(workers).ok().filter(|workers| (1..=1024).contains(workers));
                match workers {
                    Some(workers) => {
                        self.accepted(number, wait);
                        let (to, by) = (Number::Exactly(workers), wait.then_some(Ticket(number)));
                        self.inbox.push_back(Event::Scale { to, by });
                    }
                    None => {
                        let message = "a service has 1 to 1024 workers".to_owned();
                        self.clients.reply(number, &Reply::Error { message, code: 2, receipt: None }, true);
                    }
                }
            }
            Ok(Request::RestartWorker { seat, wait }) => {
                // No generation has so many seats that the core would not refuse this one.
                let seat = Seat(u16::try_from(seat).unwrap_or(u16::MAX));
                if let Some(reason) = self.core.keeps_worker(seat) {
                    let message = self.reason(reason);
                    return self.clients.reply(
                        number,
                        &Reply::Error { message, code: 1, receipt: None },
                        true,
                    );
                }
                self.accepted(number, wait);
                self.inbox.push_back(Event::Replace { seat, by: wait.then_some(Ticket(number)) });
            }
            Ok(Request::Reexec {}) => {
                self.accepted(number, true);
                self.inbox.push_back(Event::Reexec { by: Some(Ticket(number)) });
            }
            Ok(Request::Stop { wait }) => {
                self.accepted(number, wait);
                let by = wait.then_some(Ticket(number));
                self.inbox.push_back(Event::Stop { mode: StopMode::Graceful, by });
            }
        }
    }

    fn accepted(&mut self, number: u32, wait: bool) {
        if let Some(client) = self.clients.by_number.get_mut(&number) {
            client.is_waiting = wait;
        }
        self.clients.reply(number, &Reply::Accepted, !wait);
    }

    fn request_upgrade(&mut self, number: u32, wait: control::Wait) {
        let wait = core_wait(wait);
        let asked = self.trigger(Trigger::Command, wait.map(|wait| (Ticket(number), wait)));
        self.taken(number, asked, wait.is_some());
    }

    /// Whether the wish was taken.
    fn taken(&mut self, number: u32, asked: Result<(), Refusal>, wait: bool) {
        match asked {
            Ok(()) => self.accepted(number, wait),
            Err(refusal) => {
                let receipt = self.receipts.back().map(|(_, receipt)| Box::new(receipt.clone()));
                let reply = Reply::Error { message: refusal.text, code: refusal.code, receipt };
                self.clients.reply(number, &reply, true);
            }
        }
    }

    /// The end of a wait for a re-exec.
    pub(super) fn answer_reexec(&mut self, to: Ticket, done: bool) {
        let reply = match done {
            true => Reply::Done,
            false => Reply::Error { message: self.reexec_refusal(), code: 1, receipt: None },
        };
        self.clients.reply(to.0, &reply, true);
    }

    /// The end of a client's wait for an upgrade.
    pub(super) fn answer(&mut self, to: Ticket, serial: u32, asked: Asked) {
        let known = self.receipts.iter().rev().find(|(number, _)| *number == Some(serial));
        let reply = match known {
            Some((_, receipt)) => {
                let mut receipt = Box::new(receipt.clone());
                if asked == Asked::Earlier {
                    receipt.superseded_by = receipt.to;
                }
                let is_so = match asked {
                    Asked::This | Asked::Earlier => receipt.outcome == Outcome::Completed,
                    Asked::Back => receipt.outcome == Outcome::RolledBack,
                };
                Reply::Receipt { receipt, code: u8::from(!is_so) }
            }
            None => {
                Reply::Error { message: "the receipt is no longer kept".to_owned(), code: 1, receipt: None }
            }
        };
        self.clients.reply(to.0, &reply, true);
    }

    /// The end of a client's wait for workers.
    pub(super) fn answer_done(&mut self, to: Ticket, failure: Option<Reason>) {
        let reply = match failure {
            None => Reply::Done,
            Some(reason) => Reply::Error { message: self.reason(reason), code: 1, receipt: None },
        };
        self.clients.reply(to.0, &reply, true);
    }
}

/// What helps when no client can be let in.
fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(nix::libc::EMFILE) => " (raise its limit: LimitNOFILE= of the unit, prlimit --nofile)",
        Some(nix::libc::ENFILE) => " (raise fs.file-max)",
        _ => "",
    }
}

fn core_wait(wait: control::Wait) -> Option<Wait> {
    match wait {
        control::Wait::None => None,
        control::Wait::Retired => Some(Wait::Retired),
        control::Wait::Drained => Some(Wait::Drained),
    }
}
