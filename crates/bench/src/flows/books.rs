//! What is counted in a run.

use super::flow::Flow;
use super::report::{FlowReport, GenerationReport, Report, Who};
use crate::Error;
use crate::live::{Live, Shared};
use crate::report::{Latency, seconds};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

const NOTES_KEPT: usize = 20;

/// The books of one run.
#[derive(Debug, Default)]
pub(crate) struct Books {
    pub(crate) sent: u64,
    pub(crate) answers: u64,
    pub(crate) duplicates: u64,
    pub(crate) refused: u64,
    pub(crate) wrong: u64,
    strays: u64,
    pub(crate) local_errors: u64,
    generations: BTreeMap<u32, GenerationReport>,
    latencies: Vec<u32>,
    pub(crate) start_lag_max: Duration,
    notes: Vec<String>,
    /// What is new since it was last told to the watchers.
    pub(crate) news: Live,
}

impl Books {
    pub(crate) fn answer(&mut self, flow: &Flow, who: Who, latency: Duration, sent_us: u64, now_us: u64) {
        self.answers += 1;
        self.latencies.push(u32::try_from(latency.as_micros()).unwrap_or(u32::MAX));
        let stray = u64::from(who.generation < flow.floor);
        self.strays += stray;
        let part = self.generations.entry(who.generation).or_default();
        if part.answers == 0 {
            part.first_us = now_us;
        }
        part.answers += 1;
        part.last_us = now_us;
        part.last_sent_us = part.last_sent_us.max(sent_us);
        part.last_begun_us = part.last_begun_us.max(flow.begun_us());
        *part.seats.entry(who.seat).or_default() += 1;
        self.news.answers += 1;
        self.news.strays += stray;
        *self.news.generations.entry(who.generation).or_default() += 1;
    }

    pub(crate) fn refused(&mut self, flow: &Flow, now_us: u64) {
        self.refused += 1;
        self.note(format!("{:.3} s: {} was refused", seconds(now_us), flow.source()));
    }

    pub(crate) fn local_error(&mut self, what: &str) {
        self.local_errors += 1;
        self.note(format!("local error: {what}"));
    }

    pub(crate) fn note(&mut self, note: String) {
        self.news.last_error = Some(note.clone());
        if self.notes.len() < NOTES_KEPT {
            self.notes.push(note);
        }
    }

    /// Tells the watchers, once for all that happened in a turn.
    pub(crate) fn tell(&mut self, shared: &Shared) {
        let news = std::mem::take(&mut self.news);
        if news.issued == 0 && news.answers == 0 && news.last_error.is_none() {
            return;
        }
        shared.update(|live| {
            live.issued += news.issued;
            live.answers += news.answers;
            live.strays += news.strays;
            for (generation, answers) in news.generations {
                *live.generations.entry(generation).or_default() += answers;
            }
            live.last_error = news.last_error.or(live.last_error.take());
        });
    }

    /// Closes the books.
    pub(crate) fn close(
        mut self,
        target: SocketAddr,
        elapsed_us: u64,
        dropped_here: u64,
        flows: Vec<FlowReport>,
    ) -> Result<Report, Error> {
        let Self { sent, answers, .. } = self;
        let lost = flows.iter().map(|flow| flow.lost_us.len() as u64).sum();
        if answers + lost != sent {
            return Err(Error::Unbalanced { issued: sent, settled: answers + lost });
        }
        for flow in &flows {
            for at in &flow.lost_us {
                self.note(format!("{:.3} s: nobody answered {}", seconds(*at), flow.source));
            }
        }
        Ok(Report {
            target,
            elapsed_us,
            sent,
            answers,
            lost,
            valid: sent > 0 && dropped_here == 0 && self.local_errors == 0,
            duplicates: self.duplicates,
            refused: self.refused,
            wrong: self.wrong,
            strays: self.strays,
            moves: flows.iter().map(|flow| flow.spans.len().saturating_sub(1) as u64).sum(),
            dropped_here,
            local_errors: self.local_errors,
            generations: self.generations,
            latency: Latency::of(self.latencies),
            start_lag_max_us: micros(self.start_lag_max),
            flows,
            notes: self.notes,
        })
    }
}

pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
