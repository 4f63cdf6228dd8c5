//! The loop: issues what is due, lets ready connections act, books what became of them.

use crate::connection::{Connection, Plan, Progress};
use crate::fate::{Fate, Kind};
use crate::ledger::Ledger;
use crate::live::Shared;
use crate::schedule::{Agenda, Due, Random};
use crate::wait::{EVENTS_PER_TURN, wait};
use crate::{Error, Report, Spec};
use rustix::event::epoll;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a client stays away after a loss: a refusing server must not turn its clients into a busy loop.
const LOSS_PAUSE: Duration = Duration::from_millis(50);
/// In how many pieces half of the slow connections send their request.
const SLOW_PIECES: u32 = 4;

/// One run.
#[derive(Debug)]
pub(crate) struct Generator {
    spec: Spec,
    shared: Arc<Shared>,
    started: Instant,
    epoll: OwnedFd,
    agenda: Agenda,
    random: Random,
    ledger: Ledger,
    slots: Vec<Option<Connection>>,
    free: Vec<usize>,
    arrivals_left: u64,
    stopping: bool,
}

impl Generator {
    pub(crate) fn new(spec: Spec, shared: Arc<Shared>) -> Result<Self, Error> {
        spec.check()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|errno| Error::generator("epoll_create", errno))?;
        let started = Instant::now();
        let mut agenda = Agenda::default();
        if spec.rate > 0.0 {
            agenda.add(started, Due::New);
        }
        if spec.burst > 0 {
            agenda.add(started, Due::Burst);
        }
        if let Some(duration) = spec.duration {
            agenda.add(started + duration, Due::End);
        }
        // Spread out, so that standing clients don't come as one burst, now and for ever after.
        let kinds = [
            (Kind::Slow, spec.slow, spec.silence.1),
            (Kind::HalfOpen, spec.half_open, spec.silence.1),
            (Kind::KeepAlive, spec.keep_alive, spec.keep_alive_every),
        ];
        for (kind, clients, span) in kinds {
            (0..clients).for_each(|client| agenda.add(started + span * client / clients, Due::Client(kind)));
        }
        Ok(Self {
            ledger: Ledger::new(started, Arc::clone(&shared)),
            random: Random::new(spec.seed),
            arrivals_left: spec.limit.unwrap_or(u64::MAX),
            spec,
            shared,
            started,
            epoll,
            agenda,
            slots: Vec::new(),
            free: Vec::new(),
            stopping: false,
        })
    }

    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Runs until arrivals have ended and every connection has its fate.
    pub(crate) fn run(mut self) -> Result<Report, Error> {
        let mut events = Vec::with_capacity(EVENTS_PER_TURN);
        loop {
            let now = Instant::now();
            while let Some((at, due)) = self.agenda.pop_due(now) {
                self.act(at, due)?;
            }
            if self.stopping && self.free.len() == self.slots.len() {
                return self.ledger.close(&self.spec);
            }
            let stop = (!self.stopping).then(|| self.shared.stop_wish());
            if wait(&self.epoll, stop, self.agenda.next_at(), &mut events)? {
                self.stop();
            }
            for event in events.drain(..) {
                // The kernel hands back what `issue` gave it: a slot's index.
                if let Ok(slot) = usize::try_from(event.data.u64()) {
                    self.advance(slot, Connection::ready);
                }
            }
        }
    }

    fn act(&mut self, at: Instant, due: Due) -> Result<(), Error> {
        match due {
            Due::Connection { slot, number } => {
                // A wake-up that was put off or whose connection has ended stays in the agenda: pass over it.
                let meant =
                    |connection: &Connection| connection.plan.number == number && connection.wake_at == at;
                if self.slots.get(slot).and_then(Option::as_ref).is_some_and(meant) {
                    self.advance(slot, Connection::wake);
                }
            }
            Due::End => self.stop(),
            _ if self.stopping => {}
            Due::New => {
                let gap = if self.spec.poisson {
                    self.random.exponential(self.spec.rate)
                } else {
                    Duration::from_secs_f64(1.0 / self.spec.rate)
                };
                self.agenda.add(at + gap, Due::New);
                self.issue(Kind::New, at)?;
            }
            Due::Burst => {
                self.agenda.add(at + self.spec.burst_every, Due::Burst);
                for _ in 0..self.spec.burst {
                    self.issue(Kind::Burst, at)?;
                }
            }
            Due::Client(kind) => self.issue(kind, at)?,
        }
        Ok(())
    }

    fn issue(&mut self, kind: Kind, due: Instant) -> Result<(), Error> {
        if self.stopping || self.arrivals_left == 0 {
            self.stop();
            return Ok(());
        }
        self.arrivals_left -= 1;
        let now = Instant::now();
        let number = self.ledger.issue(kind, now - due);
        let silence = match kind {
            Kind::Slow | Kind::HalfOpen => self.random.between(self.spec.silence),
            Kind::New | Kind::Burst | Kind::KeepAlive => Duration::ZERO,
        };
        let pieces = if kind == Kind::Slow && self.random.unit() < 0.5 { SLOW_PIECES } else { 1 };
        let plan = Plan { kind, number, due, silence, pieces, floor: self.shared.floor() };
        match Connection::begin(&self.spec, plan, now) {
            Ok(connection) => self.admit(connection)?,
            Err((fate, detail)) => {
                self.ledger.settle(plan, None, fate, detail, now);
                self.come_again(kind, now + LOSS_PAUSE);
            }
        }
        if self.arrivals_left == 0 {
            self.stop();
        }
        Ok(())
    }

    fn admit(&mut self, connection: Connection) -> Result<(), Error> {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let interest = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&self.epoll, &connection, epoll::EventData::new_u64(slot as u64), interest)
            .map_err(|errno| Error::generator("epoll_ctl", errno))?;
        self.agenda.add(connection.wake_at, Due::Connection { slot, number: connection.plan.number });
        self.slots[slot] = Some(connection);
        Ok(())
    }

    /// Lets a connection act and books what came of it.
    fn advance(&mut self, slot: usize, act: fn(&mut Connection, &Spec, Instant) -> Progress) {
        let Some(mut connection) = self.slots[slot].take() else { return };
        let now = Instant::now();
        let wake_at = connection.wake_at;
        let end = match act(&mut connection, &self.spec, now) {
            Progress::Pending => None,
            Progress::Answered(answer) => {
                self.ledger.answer(&connection, answer, now);
                self.stopping.then(|| (Fate::Answered, String::new()))
            }
            Progress::Finished(answer) => {
                self.ledger.answer(&connection, answer, now);
                Some((Fate::Answered, String::new()))
            }
            Progress::Settled(fate, detail) => Some((fate, detail)),
        };
        if let Some((fate, detail)) = end {
            let pause = if fate == Fate::Answered { Duration::ZERO } else { LOSS_PAUSE };
            self.come_again(connection.plan.kind, connection.next_visit(&self.spec).max(now + pause));
            self.ledger.settle(connection.plan, Some(&connection), fate, detail, now);
            self.free.push(slot);
            return;
        }
        if connection.wake_at != wake_at {
            self.agenda.add(connection.wake_at, Due::Connection { slot, number: connection.plan.number });
        }
        self.slots[slot] = Some(connection);
    }

    fn come_again(&mut self, kind: Kind, at: Instant) {
        if matches!(kind, Kind::Slow | Kind::HalfOpen | Kind::KeepAlive) {
            self.agenda.add(at, Due::Client(kind));
        }
    }

    /// Ends arrivals. Connections between two requests end with them; all others come to their fate in their time.
    fn stop(&mut self) {
        if std::mem::replace(&mut self.stopping, true) {
            return;
        }
        let now = Instant::now();
        for (slot, place) in self.slots.iter_mut().enumerate() {
            if let Some(connection) = place.take_if(|connection| connection.is_idle()) {
                self.ledger.settle(connection.plan, Some(&connection), Fate::Answered, String::new(), now);
                self.free.push(slot);
            }
        }
    }
}
