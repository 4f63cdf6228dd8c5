//! What load to make.

use crate::Error;
use std::net::SocketAddr;
use std::time::Duration;

/// The load to make. Everything but the target has a default; the default load is none at all.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Where the service receives.
    pub target: SocketAddr,
    /// Flows that last from the beginning of the run to its end.
    pub flows: u32,
    /// Datagrams per second of all flows together: they take turns, and who is silent is passed over.
    pub rate: f64,
    /// Further flows begun per second, each with a datagram at once, beside `rate`. From then on they take turns too.
    pub new_flows: f64,
    /// How long each of those lasts.
    pub new_life: Duration,
    /// How many of the lasting flows are silent at times.
    pub pausing: u32,
    /// How long such a flow speaks before it is silent.
    pub speak: Duration,
    /// How long it is silent.
    pub pause: Duration,
    /// Send for this long; `None`: until stopped.
    pub duration: Option<Duration>,
    /// Send at most this many datagrams, then end.
    pub limit: Option<u64>,
    /// How long answers are waited for after the last datagram. What is not answered then is lost.
    pub answer_timeout: Duration,
    /// Receive buffer of each flow in bytes, as far as the kernel grants it.
    pub receive_buffer: usize,
}

impl Spec {
    /// No load yet, on `target`.
    #[must_use]
    pub fn new(target: SocketAddr) -> Self {
        Self {
            target,
            flows: 0,
            rate: 0.0,
            new_flows: 0.0,
            new_life: Duration::from_secs(1),
            pausing: 0,
            speak: Duration::from_secs(1),
            pause: Duration::from_secs(1),
            duration: None,
            limit: None,
            answer_timeout: Duration::from_secs(5),
            receive_buffer: 4 << 20,
        }
    }

    /// Flows that last as long as the run.
    #[must_use]
    pub fn flows(mut self, flows: u32) -> Self {
        self.flows = flows;
        self
    }

    /// Datagrams per second of all flows together.
    #[must_use]
    pub fn rate(mut self, per_second: f64) -> Self {
        self.rate = per_second;
        self
    }

    /// Further flows begun per second.
    #[must_use]
    pub fn new_flows(mut self, per_second: f64) -> Self {
        self.new_flows = per_second;
        self
    }

    /// How long each of the further flows lasts.
    #[must_use]
    pub fn new_life(mut self, life: Duration) -> Self {
        self.new_life = life;
        self
    }

    /// So many of the lasting flows speak for a while and are silent for a while, not all at the same time.
    #[must_use]
    pub fn pausing(mut self, flows: u32, speak: Duration, pause: Duration) -> Self {
        (self.pausing, self.speak, self.pause) = (flows, speak, pause);
        self
    }

    /// Ends after this time (plus what is not answered then).
    #[must_use]
    pub fn duration(mut self, duration: Duration) -> Self {
        self.duration = Some(duration);
        self
    }

    /// Ends after this many datagrams.
    #[must_use]
    pub fn limit(mut self, datagrams: u64) -> Self {
        self.limit = Some(datagrams);
        self
    }

    /// Waits this long for answers after the last datagram.
    #[must_use]
    pub fn answer_timeout(mut self, timeout: Duration) -> Self {
        self.answer_timeout = timeout;
        self
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let refuse = |what: &str| Err(Error::Spec(what.into()));
        if ![self.rate, self.new_flows].iter().all(|rate| (0.0..=1e6).contains(rate)) {
            return refuse("rate and new flows: allowed are 0 to 1000000 per second");
        }
        if (self.rate == 0.0 || self.flows == 0) && self.new_flows == 0.0 {
            return refuse("no load: give flows and a rate, or new flows");
        }
        if self.pausing > self.flows {
            return refuse("pausing: more than there are flows");
        }
        if self.pausing > 0 && (self.speak.is_zero() || self.pause.is_zero()) {
            return refuse("pausing: neither the time to speak nor the pause may be 0");
        }
        Ok(())
    }
}
