//! What load to make.

use crate::Error;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

/// What is asked and what counts as the right answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// `GET` this path (HTTP/1.0, or 1.1 on keep-alive connections); right is status 200 and a whole body, by
    /// Content-Length or by end of file.
    Http(String),
    /// One line; right is a line that begins with the same text in upper case. What follows on it may carry tags.
    Echo,
    /// This line; right is a line that begins with that text.
    Line {
        /// What is asked, without the line's end.
        asked: String,
        /// What the answer begins with.
        answer: String,
    },
}

/// The load to make. Everything but the target has a default; the default load is none at all.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Where the service listens.
    pub target: SocketAddr,
    /// What is asked.
    pub protocol: Protocol,
    /// New connections per second.
    pub rate: f64,
    /// Exponentially distributed gaps between new connections instead of equal ones.
    pub poisson: bool,
    /// Connections per burst.
    pub burst: u32,
    /// Time from burst to burst.
    pub burst_every: Duration,
    /// Clients of [`Kind::Slow`](crate::Kind::Slow) that exist at any time; each comes again when it is done.
    pub slow: u32,
    /// Clients of [`Kind::HalfOpen`](crate::Kind::HalfOpen) that exist at any time.
    pub half_open: u32,
    /// Shortest and longest silence of slow and half-open clients.
    pub silence: (Duration, Duration),
    /// Clients of [`Kind::KeepAlive`](crate::Kind::KeepAlive) that exist at any time.
    pub keep_alive: u32,
    /// Time from request to request on a keep-alive connection.
    pub keep_alive_every: Duration,
    /// Requests after which a keep-alive client closes its connection and comes again.
    pub keep_alive_requests: u32,
    /// Issue connections for this long; `None`: until stopped.
    pub duration: Option<Duration>,
    /// Issue at most this many connections of all kinds together, then end.
    pub limit: Option<u64>,
    /// How long an unanswered SYN is waited for.
    pub connect_timeout: Duration,
    /// How long a response is waited for, from the moment the request is out.
    pub response_timeout: Duration,
    /// How many source addresses 127.0.0.1, 127.0.0.2 … are used in turn, so that ports don't run out. Only for
    /// targets in 127.0.0.0/8; 0 lets the kernel choose.
    pub sources: u8,
    /// Seed of all random choices.
    pub seed: u64,
}

impl Spec {
    /// No load yet, on `target`, HTTP `GET /`.
    #[must_use]
    pub fn new(target: SocketAddr) -> Self {
        Self {
            target,
            protocol: Protocol::Http("/".into()),
            rate: 0.0,
            poisson: false,
            burst: 0,
            burst_every: Duration::from_millis(300),
            slow: 0,
            half_open: 0,
            silence: (Duration::from_millis(200), Duration::from_millis(600)),
            keep_alive: 0,
            keep_alive_every: Duration::from_millis(50),
            keep_alive_requests: 100,
            duration: None,
            limit: None,
            connect_timeout: Duration::from_secs(5),
            response_timeout: Duration::from_secs(5),
            sources: 20,
            seed: 1,
        }
    }

    /// Speaks upper-casing echo instead of HTTP.
    #[must_use]
    pub fn echo(mut self) -> Self {
        self.protocol = Protocol::Echo;
        self
    }

    /// New connections per second.
    #[must_use]
    pub fn rate(mut self, per_second: f64) -> Self {
        self.rate = per_second;
        self
    }

    /// Bursts of `connections`, one at the start and then one `every` so often.
    #[must_use]
    pub fn burst(mut self, connections: u32, every: Duration) -> Self {
        (self.burst, self.burst_every) = (connections, every);
        self
    }

    /// Slow clients.
    #[must_use]
    pub fn slow(mut self, clients: u32) -> Self {
        self.slow = clients;
        self
    }

    /// Half-open clients.
    #[must_use]
    pub fn half_open(mut self, clients: u32) -> Self {
        self.half_open = clients;
        self
    }

    /// Keep-alive clients, each asking once `every` so often.
    #[must_use]
    pub fn keep_alive(mut self, clients: u32, every: Duration) -> Self {
        (self.keep_alive, self.keep_alive_every) = (clients, every);
        self
    }

    /// Ends after this time (plus what is open then).
    #[must_use]
    pub fn duration(mut self, duration: Duration) -> Self {
        self.duration = Some(duration);
        self
    }

    /// Ends after this many connections.
    #[must_use]
    pub fn limit(mut self, connections: u64) -> Self {
        self.limit = Some(connections);
        self
    }

    /// Waits this long for an answered SYN, and then again for a response.
    #[must_use]
    pub fn timeouts(mut self, connect: Duration, response: Duration) -> Self {
        (self.connect_timeout, self.response_timeout) = (connect, response);
        self
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let refuse = |what: &str| Err(Error::Spec(what.into()));
        if !(self.rate >= 0.0 && self.rate <= 1e6) {
            return refuse("rate: allowed are 0 to 1000000 new connections per second");
        }
        if self.rate == 0.0 && [self.burst, self.slow, self.half_open, self.keep_alive] == [0; 4] {
            return refuse("no load: give a rate, a burst, or slow, half-open or keep-alive clients");
        }
        if self.burst > 0 && self.burst_every.is_zero() {
            return refuse("burst: the time between bursts must not be 0");
        }
        if self.silence.0 > self.silence.1 {
            return refuse("silence: the shortest is longer than the longest");
        }
        if self.keep_alive > 0 && (self.keep_alive_requests == 0 || self.keep_alive_every.is_zero()) {
            return refuse(
                "keep-alive: neither the requests per connection nor the time between them may be 0",
            );
        }
        Ok(())
    }

    /// The source address of the connection with this number, if one is to be bound.
    pub(crate) fn source(&self, number: u64) -> Option<Ipv4Addr> {
        let loopback = matches!(self.target.ip(), IpAddr::V4(ip) if ip.is_loopback());
        let turn = number.checked_rem(u64::from(self.sources)).filter(|_| loopback)?;
        u8::try_from(turn + 1).ok().map(|last| Ipv4Addr::new(127, 0, 0, last))
    }
}
