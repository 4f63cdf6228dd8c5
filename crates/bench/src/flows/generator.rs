//! The loop: sends what is due, books what comes back.

use super::books::{Books, micros};
use super::flow::{Flow, Heard};
use super::report::Report;
use super::spec::Spec;
use crate::Error;
use crate::live::Shared;
use crate::wait::{EVENTS_PER_TURN, wait};
use rustix::event::epoll;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Datagrams sent before answers are looked for: who is late must not fill its own sockets.
const SENDS_PER_TURN: u32 = 64;

/// One run.
#[derive(Debug)]
pub(crate) struct Generator {
    spec: Spec,
    shared: Arc<Shared>,
    started: Instant,
    epoll: OwnedFd,
    /// The number of this run among all of the process.
    run: u32,
    /// Every flow of the run. Their sockets stay open, so that no port comes twice.
    flows: Vec<Flow>,
    /// Those that take turns, and whose turn it is.
    speaking: Vec<usize>,
    turn: usize,
    /// Turns taken, and further flows begun.
    turns: u64,
    further: u64,
    /// Nothing more is sent; answers are waited for.
    stopping: bool,
    last_sent: Instant,
    books: Books,
}

impl Generator {
    pub(crate) fn new(spec: Spec, shared: Arc<Shared>) -> Result<Self, Error> {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        spec.check()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|errno| Error::generator("epoll_create", errno))?;
        let started = Instant::now();
        let mut generator = Self {
            shared,
            started,
            epoll,
            run: RUNS.fetch_add(1, Ordering::Relaxed),
            flows: Vec::new(),
            speaking: Vec::new(),
            turn: 0,
            turns: 0,
            further: 0,
            stopping: false,
            last_sent: started,
            books: Books::default(),
            spec,
        };
        for _ in 0..generator.spec.flows {
            generator.begin_flow(None).map_err(|source| Error::generator("socket of a flow", source))?;
        }
        // Making thousands of sockets takes a while, for which no datagram is late.
        generator.started = Instant::now();
        Ok(generator)
    }

    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Runs until sending has ended and every datagram is answered or given up.
    pub(crate) fn run(mut self) -> Result<Report, Error> {
        let mut events = Vec::with_capacity(EVENTS_PER_TURN);
        loop {
            let until = self.send_due();
            self.books.tell(&self.shared);
            if self.stopping {
                let all = self.books.answers == self.books.sent;
                if all || self.give_up_at() <= Instant::now() {
                    return self.close();
                }
            }
            let stop = (!self.stopping).then(|| self.shared.stop_wish());
            if wait(&self.epoll, stop, until, &mut events)? {
                self.stopping = true;
            }
            let now = Instant::now();
            for event in events.drain(..) {
                // The kernel hands back what `begin_flow` gave it: an index.
                if let Some(index) =
                    usize::try_from(event.data.u64()).ok().filter(|at| *at < self.flows.len())
                {
                    self.hear(index, now);
                }
            }
        }
    }

    /// Sends what is due by now, and says when there is more to do.
    fn send_due(&mut self) -> Option<Instant> {
        for _ in 0..SENDS_PER_TURN {
            if self.stopping {
                return Some(self.give_up_at());
            }
            let turn = self.due(self.turns, self.spec.rate);
            let further = self.due(self.further, self.spec.new_flows);
            let end = self.spec.duration.map(|duration| self.started + duration);
            let at = [turn, further, end].into_iter().flatten().min()?;
            let now = Instant::now();
            if at > now {
                return Some(at);
            }
            if end == Some(at) {
                self.stopping = true;
            } else if further == Some(at) {
                self.further += 1;
                match self.begin_flow(Some(at + self.spec.new_life)) {
                    Ok(index) => self.send(index, at, now),
                    Err(error) => self.books.local_error(&format!("a flow can't be begun: {error}")),
                }
            } else {
                self.turns += 1;
                if let Some(index) = self.next_speaker(now) {
                    self.send(index, at, now);
                }
            }
        }
        Some(Instant::now())
    }

    /// When the event with this number is due that happens so often in a second.
    fn due(&self, number: u64, per_second: f64) -> Option<Instant> {
        (per_second > 0.0).then(|| self.started + Duration::from_secs_f64(number as f64 / per_second))
    }

    fn give_up_at(&self) -> Instant {
        self.last_sent + self.spec.answer_timeout
    }

    /// Whose turn it is; nobody's if all are silent.
    fn next_speaker(&mut self, now: Instant) -> Option<usize> {
        let flows = &self.flows;
        if self.turn >= self.speaking.len() {
            self.turn = 0;
            self.speaking.retain(|index| flows[*index].ends.is_none_or(|ends| ends > now));
        }
        let rest = self.speaking.iter().enumerate().skip(self.turn);
        let start = self.speaking.iter().enumerate().take(self.turn);
        let speaks =
            |index: usize| flows[index].ends.is_none_or(|ends| ends > now) && !self.is_silent(index, now);
        let (at, index) =
            rest.chain(start).find(|(_, index)| speaks(**index)).map(|(at, index)| (at, *index))?;
        self.turn = at + 1;
        Some(index)
    }

    /// Whether this flow pauses. Pauses are spread out.
    fn is_silent(&self, index: usize, now: Instant) -> bool {
        let pausing = self.spec.pausing as usize;
        if index >= pausing {
            return false;
        }
        let (speak, round) = (self.spec.speak, self.spec.speak + self.spec.pause);
        let shift = round.mul_f64(index as f64 / pausing as f64);
        let into = (now.saturating_duration_since(self.started) + shift).as_nanos() % round.as_nanos();
        into >= speak.as_nanos()
    }

    fn begin_flow(&mut self, ends: Option<Instant>) -> std::io::Result<usize> {
        let index = self.flows.len();
        let label = format!("{}-{} {index}", std::process::id(), self.run);
        let source = source(self.spec.target.ip(), self.run);
        let mut flow = Flow::begin(self.spec.target, source, self.spec.receive_buffer, label)?;
        flow.ends = ends;
        epoll::add(&self.epoll, &flow, epoll::EventData::new_u64(index as u64), epoll::EventFlags::IN)?;
        self.flows.push(flow);
        self.speaking.push(index);
        Ok(index)
    }

    fn send(&mut self, index: usize, due: Instant, now: Instant) {
        let now_us = self.micros(now);
        let flow = &mut self.flows[index];
        if !flow.has_begun() {
            flow.floor = self.shared.floor();
        }
        let sent = flow.send(due, now_us);
        if sent.refused {
            self.books.refused(flow, now_us);
        }
        match sent.result {
            Ok(()) => {
                self.last_sent = now;
                self.books.sent += 1;
                self.books.news.issued += 1;
                self.books.start_lag_max = self.books.start_lag_max.max(now.saturating_duration_since(due));
                if self.spec.limit.is_some_and(|limit| self.books.sent >= limit) {
                    self.stopping = true;
                }
            }
            Err(error) => self.books.local_error(&format!("{} can't send: {error}", flow.source())),
        }
    }

    fn hear(&mut self, index: usize, now: Instant) {
        let now_us = self.micros(now);
        let flow = &mut self.flows[index];
        match flow.hear(now) {
            Heard::Duplicate => self.books.duplicates += 1,
            Heard::Answer { who, latency, sent_us } => {
                self.books.answer(flow, who, latency, sent_us, now_us);
            }
            Heard::Refused => self.books.refused(flow, now_us),
            Heard::Wrong(text) => {
                self.books.wrong += 1;
                self.books.note(format!("{} received {text:?}", flow.source()));
            }
            Heard::Nothing => {}
            Heard::Failed(error) => {
                self.books.local_error(&format!("{} can't receive: {error}", flow.source()));
            }
        }
    }

    fn micros(&self, at: Instant) -> u64 {
        micros(at.saturating_duration_since(self.started))
    }

    fn close(self) -> Result<Report, Error> {
        let elapsed_us = self.micros(Instant::now());
        let mut dropped_here = 0;
        for flow in &self.flows {
            dropped_here += flow.dropped().map_err(|source| Error::generator("SO_MEMINFO", source))?;
        }
        let begun = self.flows.into_iter().filter(Flow::has_begun);
        self.books.close(self.spec.target, elapsed_us, dropped_here, begun.map(Flow::close).collect())
    }
}

/// Where the flows of a run come from. On 127.0.0.0/8 each run of this process has an address of its own, so that none
/// of its flows is taken for one of an earlier run that had the same port.
fn source(target: IpAddr, run: u32) -> IpAddr {
    match target {
        IpAddr::V4(target) if target.is_loopback() => {
            let [.., high, low] = (run % 0xfe00).to_be_bytes();
            Ipv4Addr::new(127, high + 1, low, 1).into()
        }
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}
