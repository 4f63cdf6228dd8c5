//! The books of a run: every connection is entered once when issued and once when settled.

use crate::connection::{Answer, Connection, Plan};
use crate::fate::{Fate, Fates, Kind};
use crate::live::Shared;
use crate::report::{GenerationReport, KindReport, Latency, Loss, Report};
use crate::{Error, Spec};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

const LOSSES_KEPT: usize = 20;

/// The books of one run, and the counters that others may watch meanwhile.
#[derive(Debug)]
pub(crate) struct Ledger {
    started: Instant,
    shared: Arc<Shared>,
    kinds: BTreeMap<Kind, (KindReport, Vec<u32>)>,
    generations: BTreeMap<u32, GenerationReport>,
    pids: BTreeMap<u32, u64>,
    issued: u64,
    answers: u64,
    untagged: u64,
    strays: u64,
    start_lag_max: Duration,
    losses: Vec<Loss>,
}

impl Ledger {
    pub(crate) fn new(started: Instant, shared: Arc<Shared>) -> Self {
        Self {
            started,
            shared,
            kinds: BTreeMap::new(),
            generations: BTreeMap::new(),
            pids: BTreeMap::new(),
            issued: 0,
            answers: 0,
            untagged: 0,
            strays: 0,
            start_lag_max: Duration::ZERO,
            losses: Vec::new(),
        }
    }

    /// Enters a new connection and gives it its number, from 0 on.
    pub(crate) fn issue(&mut self, kind: Kind, lag: Duration) -> u64 {
        self.kinds.entry(kind).or_default().0.issued += 1;
        self.start_lag_max = self.start_lag_max.max(lag);
        self.issued += 1;
        self.shared.update(|live| live.issued += 1);
        self.issued - 1
    }

    pub(crate) fn answer(&mut self, connection: &Connection, answer: Answer, now: Instant) {
        let (part, latencies) = self.kinds.entry(connection.plan.kind).or_default();
        part.answers += 1;
        self.answers += 1;
        latencies.push(u32::try_from(answer.latency.as_micros()).unwrap_or(u32::MAX));
        let (at, begun) = (self.micros(now), self.micros(connection.begun));
        let tags = answer.tags;
        if let Some(pid) = tags.pid {
            *self.pids.entry(pid).or_default() += 1;
        }
        let stray = tags.generation.is_some_and(|generation| generation < connection.plan.floor);
        self.strays += u64::from(stray);
        if let Some(generation) = tags.generation {
            let part = self.generations.entry(generation).or_default();
            if part.answers == 0 {
                part.first_us = at;
            }
            part.answers += 1;
            part.last_us = at;
            part.last_begun_us = part.last_begun_us.max(begun);
            if let Some(seat) = tags.seat {
                *part.seats.entry(seat).or_default() += 1;
            }
        } else {
            self.untagged += 1;
        }
        self.shared.update(|live| {
            live.answers += 1;
            live.strays += u64::from(stray);
            if let Some(generation) = tags.generation {
                *live.generations.entry(generation).or_default() += 1;
            }
        });
    }

    /// Enters the end of a connection. `begun` is missing where it never came to a SYN.
    pub(crate) fn settle(
        &mut self,
        plan: Plan,
        connection: Option<&Connection>,
        fate: Fate,
        detail: String,
        now: Instant,
    ) {
        self.kinds.entry(plan.kind).or_default().0.fates.add(fate, 1);
        let loss = (fate != Fate::Answered).then(|| Loss {
            fate,
            kind: plan.kind,
            source: connection.and_then(Connection::source),
            begun_us: self.micros(connection.map_or(now, |connection| connection.begun)),
            ended_us: self.micros(now),
            detail,
        });
        self.shared.update(|live| {
            live.fates.add(fate, 1);
            if let Some(loss) = &loss {
                live.last_error = Some(loss.to_string());
            }
        });
        self.losses.extend(loss.filter(|_| self.losses.len() < LOSSES_KEPT));
    }

    /// Closes the books.
    pub(crate) fn close(self, spec: &Spec) -> Result<Report, Error> {
        let mut fates = Fates::default();
        for (part, _) in self.kinds.values() {
            part.fates.iter().for_each(|(fate, connections)| fates.add(fate, connections));
        }
        if fates.total() != self.issued {
            return Err(Error::Unbalanced { issued: self.issued, settled: fates.total() });
        }
        let finish = |(kind, (part, latencies)): (Kind, (KindReport, Vec<u32>))| {
            (kind, KindReport { latency: Latency::of(latencies), ..part })
        };
        Ok(Report {
            target: spec.target,
            elapsed_us: self.micros(Instant::now()),
            issued: self.issued,
            answers: self.answers,
            valid: self.issued > 0 && fates.count(Fate::LocalError) == 0,
            lost: fates.lost(),
            fates,
            strays: self.strays,
            kinds: self.kinds.into_iter().map(finish).collect(),
            generations: self.generations,
            untagged: self.untagged,
            pids: self.pids,
            start_lag_max_us: u64::try_from(self.start_lag_max.as_micros()).unwrap_or(u64::MAX),
            losses: self.losses,
        })
    }

    fn micros(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.started).as_micros()).unwrap_or(u64::MAX)
    }
}
