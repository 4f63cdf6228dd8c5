//! Signs of life, where the master waits for them (`[watchdog] timeout`).

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use reuseportd_wire::env;

use crate::{Error, Variables, variable};

/// What a full queue at the master's end costs of the interval until the next attempt.
const RETRY_SHARE: u32 = 8;

/// Tells the master that this program lives. A ready worker that does not say so within `[watchdog] timeout` is killed
/// and replaced.
///
/// [`Worker::ready`](crate::Worker::ready) and [`Serving::accept_each`](crate::Serving::accept_each) do this
/// themselves. A program with a loop of its own calls [`Watchdog::feed`] from that loop, for what is to be proven is
/// that the loop goes round: a thread or timer beside it that always feeds proves nothing. So the SDK has none.
///
/// ```no_run
/// # fn main() -> Result<(), reuseportd_worker::Error> {
/// let mut watchdog = reuseportd_worker::Watchdog::from_env()?;
/// loop {
///     let timeout = watchdog.as_mut().map(|watchdog| watchdog.feed()).transpose()?;
///     // wait for connections and orders, `timeout` at the most, and see to them
/// #   std::thread::sleep(timeout.unwrap_or_default());
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct Watchdog {
    interval: Duration,
    pub(crate) due: Instant,
    /// Held, because a program that has run out of descriptors lives.
    socket: UnixDatagram,
    master: SocketAddr,
}

impl Watchdog {
    /// What `WATCHDOG_USEC` and `NOTIFY_SOCKET` ask for; `None` if nobody waits for signs of life, or those of another
    /// process (`WATCHDOG_PID`).
    ///
    /// # Errors
    /// A variable of the wrong form; no socket can be made.
    pub fn from_env() -> Result<Option<Self>, Error> {
        Self::from_variables(&|name| std::env::var_os(name))
    }

    pub(crate) fn from_variables(variables: &Variables<'_>) -> Result<Option<Self>, Error> {
        let timeout = variable(variables, env::WATCHDOG_USEC)?.filter(|timeout| *timeout > 0);
        let pid = variable::<u32>(variables, env::WATCHDOG_PID)?;
        let (Some(timeout), Some(master)) = (timeout, variables(env::NOTIFY_SOCKET)) else { return Ok(None) };
        if pid.is_some_and(|pid| pid != std::process::id()) {
            return Ok(None);
        }
        let failed = Error::io::<io::Error>("make the socket for signs of life to NOTIFY_SOCKET");
        let open = || {
            let master = match master.as_bytes() {
                [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
                _ => SocketAddr::from_pathname(&master)?,
            };
            let socket = UnixDatagram::unbound()?;
            socket.set_nonblocking(true)?;
            Ok((socket, master))
        };
        let (socket, master) = open().map_err(failed)?;
        // Twice in each timeout, so that one may be late.
        let interval = Duration::from_micros(timeout) / 2;
        Ok(Some(Self { interval, due: Instant::now(), socket, master }))
    }

    /// Sends `WATCHDOG=1` if it is time to, and says how long until it is again. Never blocks.
    ///
    /// # Errors
    /// The socket can't be reached from here; a master that is gone is no error.
    pub fn feed(&mut self) -> Result<Duration, Error> {
        let now = Instant::now();
        if self.due <= now {
            self.due = now + if self.alive()? { self.interval } else { self.interval / RETRY_SHARE };
        }
        Ok(self.due - now)
    }

    /// Whether it was said: the master may have too much to read already.
    pub(crate) fn alive(&self) -> Result<bool, Error> {
        match self.socket.send_to_addr(b"WATCHDOG=1", &self.master) {
            Ok(_) => Ok(true),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(true),
                _ => Err(Error::io("tell the master by NOTIFY_SOCKET that this worker lives")(error)),
            },
        }
    }
}
