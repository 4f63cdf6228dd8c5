//! SDK for worker programs: bind, hand over, serve, stop without losing a connection.
//!
//! A worker binds its addresses but does not listen. It hands the bound sockets to the master, which
//! calls `listen()` on them when it wants connections to arrive, and then says `serve`. When the master
//! says `stop`, no new connection is chosen for this worker any more: it accepts what is left in its
//! queues, closes its listeners, says `drained`, finishes its open connections and exits.
//!
//! A UDP socket does not listen: it belongs to its address from `bind` on, and what the master has sent to it waits
//! there until the worker receives. Told to stop, the worker receives what waits in it before it closes it.
//!
//! The SDK blocks, starts no thread and brings no runtime. A threaded program needs no more than this:
//!
//! ```no_run
//! # fn main() -> Result<(), reuseportd_worker::Error> {
//! use std::io::Write;
//!
//! let worker = reuseportd_worker::Worker::from_env("http=tcp:127.0.0.1:8080")?;
//! let bound = worker.bind()?;
//! let Some(serving) = worker.ready(bound)? else { return Ok(()) };
//! std::thread::scope(|threads| {
//!     serving.accept_each(|_name, mut stream| {
//!         threads.spawn(move || stream.write_all(b"hello\n"));
//!     })
//! })
//! # }
//! ```
//!
//! [`Serving::serve_each`] serves UDP as well. A program with a loop of its own takes [`Serving`] apart: `listeners` are
//! plain [`std::net::TcpListener`]s, `datagrams` plain [`std::net::UdpSocket`]s, `orders` can be polled, and [`drain`]
//! and [`drain_datagrams`] empty them.
//!
//! SIGTERM is understood as `stop`, also when the master is gone. Where the master has a watchdog, the waiting and the
//! accepting of the SDK give it signs of life; a program with a loop of its own takes [`Watchdog`].
//!
//! Without a master (development) the same program binds the address it names itself and listens at once.

#![forbid(unsafe_code)]

mod channel;
mod datagram;
mod error;
mod listener;
mod serving;
mod watchdog;

pub use channel::{Order, Orders};
pub use datagram::drain_datagrams;
pub use error::Error;
pub use listener::{Bound, drain};
pub use reuseportd_wire::env::{Listen, Protocol};
pub use serving::Serving;
pub use socket2::Socket;
pub use watchdog::Watchdog;

use std::ffi::OsString;
use std::str::FromStr;

use reuseportd_wire::env;

use channel::Channel;

/// Connections that may wait when there is no master to say how many.
const BACKLOG_ALONE: i32 = 1024;

/// A worker that has not bound or not handed over its sockets yet.
#[derive(Debug)]
pub struct Worker {
    generation: u32,
    seat: u32,
    workers: u32,
    listen: Vec<Listen>,
    /// Absent without a master.
    channel: Option<Channel>,
}

impl Worker {
    /// Reads the environment the master gave. Without a master (no `REUSEPORTD_CHANNEL`) the worker is
    /// alone: generation 0, seat 0 of 1, and it serves `listen_alone`, written as in `REUSEPORTD_LISTEN`,
    /// unless that variable is set by hand.
    ///
    /// Call it once, early: it takes the channel's descriptor, so that no child process inherits it.
    ///
    /// # Errors
    /// A variable that is missing or has the wrong form; a channel that is no open seqpacket socket.
    pub fn from_env(listen_alone: &str) -> Result<Self, Error> {
        Self::from_variables(&|name| std::env::var_os(name), listen_alone)
    }

    fn from_variables(variables: &Variables<'_>, listen_alone: &str) -> Result<Self, Error> {
        let Some(channel) = variable::<i32>(variables, env::CHANNEL)? else {
            let listen = variable(variables, env::LISTEN)?.unwrap_or_else(|| listen_alone.to_owned());
            let listen = env::parse_listen(&listen)?;
            return Ok(Self { generation: 0, seat: 0, workers: 1, listen, channel: None });
        };
        Ok(Self {
            generation: required(variables, env::GENERATION)?,
            seat: required(variables, env::SEAT)?,
            workers: required(variables, env::WORKERS)?,
            listen: env::parse_listen(&required::<String>(variables, env::LISTEN)?)?,
            channel: Some(Channel::inherited(channel)?),
        })
    }

    /// Number of this worker's generation; 0 without a master.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// This worker's place in its generation, counted from 0.
    #[must_use]
    pub fn seat(&self) -> u32 {
        self.seat
    }

    /// Seats of this worker's generation.
    #[must_use]
    pub fn workers(&self) -> u32 {
        self.workers
    }

    /// What to bind.
    #[must_use]
    pub fn listen(&self) -> &[Listen] {
        &self.listen
    }

    /// Binds every address of [`Worker::listen`] with SO_REUSEPORT. The sockets do not listen yet.
    ///
    /// # Errors
    /// See [`Worker::bind_with`].
    pub fn bind(&self) -> Result<Vec<Bound>, Error> {
        self.bind_with(|_, _| Ok(()))
    }

    /// The same, with `set_options` called for each socket before it is bound.
    ///
    /// # Errors
    /// An address that can't be bound, or what `set_options` returned.
    pub fn bind_with(
        &self,
        mut set_options: impl FnMut(&Listen, &Socket) -> std::io::Result<()>,
    ) -> Result<Vec<Bound>, Error> {
        self.listen.iter().map(|listen| Bound::bind(listen, &mut set_options)).collect()
    }

    /// Hands the sockets over and waits until the master says `serve`: from then on connections and datagrams arrive.
    /// `None` means that it said `stop` instead (the upgrade failed elsewhere): exit with 0.
    ///
    /// Call it when everything else is initialised: the master counts this worker as ready. From here on SIGTERM is
    /// an order to stop, [`Order::Stop`], and does not end the process any more.
    ///
    /// # Errors
    /// The channel fails, or the master is gone before it said either.
    pub fn ready(self, bound: Vec<Bound>) -> Result<Option<Serving>, Error> {
        let orders = match self.channel {
            Some(channel) => {
                let mut orders = Orders::new(channel)?;
                orders.ready(&bound)?;
                if !orders.is_told_to_serve(&mut Watchdog::from_env()?)? {
                    return Ok(None);
                }
                orders
            }
            None => {
                let orders = Orders::new(Channel::silent()?)?;
                for one in &bound {
                    one.listen(BACKLOG_ALONE)?;
                }
                orders
            }
        };
        let (listeners, datagrams) = Bound::sort(bound)?;
        Ok(Some(Serving { listeners, datagrams, orders }))
    }

    /// Tells the master why this worker can't go on; the text is in the reason of the failed upgrade.
    ///
    /// # Errors
    /// The channel fails; a master that is gone is no error.
    pub fn error(&self, text: &str) -> Result<(), Error> {
        self.channel.as_ref().map_or(Ok(()), |channel| channel.send_error(text))
    }
}

/// Looks a variable up.
type Variables<'a> = dyn Fn(&str) -> Option<OsString> + 'a;

fn required<T: FromStr>(variables: &Variables<'_>, name: &'static str) -> Result<T, Error> {
    variable(variables, name)?.ok_or(Error::Missing { name })
}

fn variable<T: FromStr>(variables: &Variables<'_>, name: &'static str) -> Result<Option<T>, Error> {
    let Some(value) = variables(name) else { return Ok(None) };
    let parsed = value.to_str().and_then(|text| text.parse().ok());
    parsed.map(Some).ok_or_else(|| Error::Variable { name, value: value.to_string_lossy().into_owned() })
}

#[cfg(test)]
mod tests;
