//! What a worker is like: good, or bad in one of many ways.

use crate::rng::Rng;
use crate::world::MS;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    Missing,
    Address,
    NoReuseport,
}

/// How it takes being told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StopHow {
    /// Handover: accepts until nothing waits, then closes. Unmodified: closes at once. Then finishes what is open.
    Orderly,
    AtOnce,
    /// Closes and says so without accepting first.
    Hasty,
    Ignores,
    /// Like orderly, but never exits.
    Hangs,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Temper {
    pub(crate) handover: bool,
    /// Until it binds.
    pub(crate) start: u64,
    /// How many times it says that it is ready.
    pub(crate) announces: u8,
    pub(crate) wrong: Option<Wrong>,
    pub(crate) crash: Option<u64>,
    pub(crate) closes: Option<u64>,
    /// If it has a watchdog.
    pub(crate) hangs: Option<u64>,
    /// It does not accept for so long after it was born.
    pub(crate) sleeps: Option<u64>,
    pub(crate) stop: StopHow,
    /// It forks a child that inherits its listeners; `true`: one that TERM does not impress.
    pub(crate) child: Option<bool>,
    /// Pause before each accept, at most.
    pub(crate) accept: u64,
    pub(crate) takes: bool,
    /// It answers requests as it should.
    pub(crate) healthy: bool,
    /// Sockets per address of an unmodified worker.
    pub(crate) sockets: u8,
}

impl Temper {
    pub(crate) fn is_orderly(&self) -> bool {
        self.stop == StopHow::Orderly
    }

    /// Some temper; a bad one so many times in a thousand.
    pub(crate) fn draw(rng: &mut Rng, handover: bool, bad: u64, accept: u64) -> Temper {
        let mut temper = Temper {
            handover,
            start: rng.between(1, 60) * MS,
            announces: 1,
            wrong: None,
            crash: None,
            closes: None,
            hangs: None,
            sleeps: None,
            stop: StopHow::Orderly,
            child: rng.permille(100).then_some(false),
            accept,
            takes: true,
            healthy: true,
            sockets: if !handover && rng.permille(100) { 2 } else { 1 },
        };
        if rng.permille(bad) {
            match rng.below(13) {
                0 => temper.announces = 0,
                1 => temper.announces = 2,
                2 => temper.wrong = Some([Wrong::Missing, Wrong::Address, Wrong::NoReuseport][rng.index(3)]),
                3 => temper.crash = Some(rng.between(1, 100) * MS),
                4 => temper.crash = Some(rng.between(1, 8000) * MS),
                5 if !handover => temper.closes = Some(rng.between(1, 4000) * MS),
                6 => temper.stop = [StopHow::AtOnce, StopHow::Hasty][rng.index(2)],
                7 => temper.stop = [StopHow::Ignores, StopHow::Hangs][rng.index(2)],
                8 => temper.child = Some(true),
                9 => temper.healthy = false,
                11 => temper.sleeps = Some(rng.between(500, 3000) * MS),
                10 => temper.hangs = Some(rng.between(50, 4000) * MS),
                _ => {
                    temper.takes = false;
                    temper.start = rng.between(100, 6000) * MS;
                }
            }
        }
        temper
    }
}
