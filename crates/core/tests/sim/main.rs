//! Seeded simulation of the core: a small kernel, workers of every temper, clients that connect all the time, faults.
//!
//! First a phase in which things go wrong and nothing may be lost, then one in which they don't and everything must
//! come to rest. `REUSEPORTD_SIM_SEED=n` replays one seed and shows everything; `REUSEPORTD_SIM_STEPS=n` makes the first
//! phase longer or shorter. Without it seeds are run from `REUSEPORTD_SIM_FIRST=n` on, `REUSEPORTD_SIM_SEEDS=n` of them
//! (256), or until all together took `REUSEPORTD_SIM_TOTAL=n` steps, then from a drawn seed on if none is given.
//! `REUSEPORTD_SIM_SECONDS=n` and `REUSEPORTD_SIM_FAILURES=n` end it sooner.

mod callers;
mod datagrams;
mod death;
mod draw;
mod facts;
mod flows;
mod kernel;
mod life;
mod manners;
mod oracle;
mod orphans;
mod outside;
mod phases;
mod protocol;
mod reach;
mod receipts;
mod regressions;
mod rng;
mod scaling;
mod seats;
mod strays;
mod sweep;
mod temper;
mod trial;
mod twin;
mod upkeep;
mod verdict;
mod workers;
mod world;

use kernel::Holder;
use regressions::REGRESSIONS;
use reuseportd_core::{Engine, Event, GroupId, MasterState, StopMode, Trigger};
use std::collections::BTreeMap;
use std::time::Duration;
use sweep::{Limits, sweep};
use world::{Happening, MS, World};

/// Longest simulated time from the end of all faults to rest, and from a stop to the end.
const REST: u64 = 120_000 * MS;

fn knob(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| match value.parse() {
        Ok(number) => number,
        Err(error) => panic!("{name}={value}: {error}"),
    })
}

/// One seed, and how far it got.
struct Replay {
    seed: u64,
    step: u64,
}

impl std::fmt::Display for Replay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "REUSEPORTD_SIM_SEED={} cargo test -p reuseportd-core --test sim nothing -- --nocapture",
            self.seed
        )
    }
}

struct Run {
    tally: oracle::Tally,
    upkeep: upkeep::Tally,
    phases: phases::Tally,
    datagrams: flows::Tally,
    outcomes: BTreeMap<&'static str, u32>,
}

/// Mostly the two that steer; without steering only the rest of the rules is judged, and connections are lost.
fn engine(seed: u64) -> Engine {
    match seed % 5 {
        0 | 2 => Engine::Ebpf,
        1 | 3 => Engine::Cbpf,
        _ => Engine::None,
    }
}

fn run(replay: &mut Replay, steps: u64, verbose: bool) -> Run {
    let seed = replay.seed;
    let engine = engine(seed);
    let mut world = World::new(seed, engine, verbose);
    world.groups = u16::try_from(world.rng.between(1, 3)).unwrap_or(1);
    draw_datagrams(&mut world);
    world.seated = [0, 0, 500, 1000, 1000][world.rng.index(5)];
    // A service that can't keep up never gets its queues empty: that is nobody's promise.
    world.accept = [0, MS, 5 * MS, 20 * MS][world.rng.index(4)];
    world.pace = world.rng.between(2, 40) * MS + world.accept;
    world.mortality = [0, 10, 30, 100][world.rng.index(4)];
    world.trace(format_args!("seed {seed}, {engine:?}, {} groups", world.groups));
    world.begin();
    world.upgrade(Trigger::Start);
    world.later(0, Happening::Client);
    world.later(500 * MS, Happening::Operator);
    if world.rng.permille(200) {
        world.later(0, Happening::Stranger);
    }
    while replay.step < steps && world.oracle.protocol.exit.is_none() && world.step() {
        replay.step += 1;
    }
    come_to_rest(&mut world, replay);
    end(&mut world, replay);
    Run {
        tally: world.oracle.tally,
        upkeep: world.upkeep.tally,
        phases: world.tally(),
        datagrams: world.oracle.datagrams.tally,
        outcomes: world.oracle.protocol.outcomes.clone(),
    }
}

/// Mostly one address that takes datagrams beside others that take connections.
fn draw_datagrams(world: &mut World) {
    let taking = match world.rng.below(20) {
        0..=7 => 0,
        8..=16 => world.groups.min(2) / 2 + u16::from(world.rng.permille(300)),
        _ => world.groups,
    };
    world.kernel.datagram_groups = (0..taking.min(world.groups)).map(GroupId).collect();
    world.sources = ([2, 8, 100][world.rng.index(3)], [1000, 5000, 1_000_000][world.rng.index(3)] * MS);
}

/// No faults any more: within bounded time everything is as the operator wants it, and stays so through an upgrade.
fn come_to_rest(world: &mut World, replay: &mut Replay) {
    world.faults = false;
    world.trace(format_args!("no faults from here on"));
    // Something that was put off may be left to be done.
    world.tell(Event::Deadline);
    // What was found is upgraded away from, so that it is known what serves.
    if world.oracle.protocol.serves_found() {
        world.upgrade(Trigger::Command);
    }
    while !world.strangers.is_empty() {
        world.next_stranger();
    }
    for round in 0..2 {
        let until = world.now + REST;
        while world.oracle.protocol.exit.is_none() && !world.rests() {
            assert!(world.now < until, "no rest: {:?}", world.unrest());
            assert!(world.step(), "nothing will ever happen, but: {:?}", world.unrest());
            replay.step += 1;
        }
        if world.oracle.protocol.exit.is_some() {
            return;
        }
        if round == 0 {
            world.upgrade(Trigger::Command);
        }
    }
    world.clients = false;
    let until = world.now + 20_000 * MS;
    while world.now < until && world.step() {
        replay.step += 1;
    }
    world.oracle.judge_end(&world.kernel, &world.workers);
}

/// After a stop nobody is left.
fn end(world: &mut World, replay: &mut Replay) {
    if world.oracle.protocol.exit.is_none() {
        world.clients = true;
        world.later(0, Happening::Client);
        world.stop(StopMode::Graceful);
    }
    let until = world.now + REST;
    while world.oracle.protocol.exit.is_none() {
        assert!(world.now < until && world.step(), "no end: {:?}", world.unrest());
        replay.step += 1;
    }
    for (id, worker) in &world.workers {
        assert!(!worker.runs && !worker.child && worker.reaped, "{id:?} is left behind");
    }
    for (id, socket) in &world.kernel.sockets {
        assert!(!socket.holders.contains(&Holder::Master), "{id:?} is left behind: {socket:?}");
    }
}

impl World {
    /// Steady, every seat serves, and nobody else lives.
    fn rests(&self) -> bool {
        self.unrest().is_none()
    }

    fn unrest(&self) -> Option<String> {
        if self.dead {
            return Some("there is no master".to_owned());
        }
        let state = self.master.state();
        if state != MasterState::Steady {
            return Some(format!("{state:?}"));
        }
        if !self.oracle.protocol.is_quiet() || !self.upkeep.is_quiet() {
            return Some("somebody waits for an answer".to_owned());
        }
        let active = self.oracle.protocol.active()?;
        let seats = u32::from(self.oracle.protocol.scaling.wanted());
        let mut serving = 0;
        for (id, worker) in &self.workers {
            // The generation of one that the next master never knew may be unknown, too.
            let has_watchdog = self.plans.get(&worker.generation).is_some_and(|plan| plan.watchdog.is_some());
            let hangs = worker.mute.is_some() && has_watchdog;
            // Without steering nobody asks whether it still listens; nor is it known what an orphan listened on.
            let is_unasked = worker.orphan || self.engine == Engine::None;
            let accepts = !hangs && (!worker.deserted || is_unasked);
            let serves =
                worker.runs && accepts && worker.generation == active && self.oracle.protocol.is_serving(*id);
            serving += u32::from(serves);
            if !serves && (worker.runs || worker.child || !worker.reaped) {
                return Some(format!("{id:?} lives: {worker:?}"));
            }
        }
        if serving != seats {
            return Some(format!("{serving} of {seats} seats serve"));
        }
        if let Some(odd) = self.seats_are_odd() {
            return Some(odd);
        }
        if let Some(missing) = self.oracle.missing_handle(&self.kernel, &self.workers) {
            return Some(format!("no handle of {missing:?}"));
        }
        if let Some(unreached) = self.oracle.unreached(&self.kernel, &self.workers) {
            return Some(format!("{unreached:?} is never chosen"));
        }
        let spare = self.oracle.spare_handle(&self.kernel, &self.workers)?;
        Some(format!("a handle of {spare:?} is left: {:?}", self.kernel.sockets[&spare]))
    }
}

#[test]
fn nothing_is_lost_and_everything_ends() {
    let steps = knob("REUSEPORTD_SIM_STEPS").unwrap_or(8000);
    if let Some(seed) = knob("REUSEPORTD_SIM_SEED") {
        run(&mut Replay { seed, step: 0 }, steps, true);
        return;
    }
    let limits = Limits {
        steps: knob("REUSEPORTD_SIM_TOTAL"),
        time: knob("REUSEPORTD_SIM_SECONDS").map(Duration::from_secs),
        failures: knob("REUSEPORTD_SIM_FAILURES").and_then(|failures| usize::try_from(failures).ok()),
    };
    let seeds = match limits.steps.is_some() || limits.time.is_some() {
        true => u64::MAX,
        false => knob("REUSEPORTD_SIM_SEEDS").unwrap_or(256),
    };
    let drawn = || limits.steps.map_or(0, |_| sweep::drawn());
    let first = knob("REUSEPORTD_SIM_FIRST").unwrap_or_else(drawn);
    let sum = sweep(|nth| (nth < seeds).then_some(first + nth), steps, limits);
    assert!(sum.failed.is_empty(), "seeds failed, which are listed above");
    if limits.time.is_none() {
        assert!(sum.steps >= limits.steps.unwrap_or(0), "only {} steps were taken", sum.steps);
    }
    // What never happens is not tested either.
    if sum.seeds >= 256 {
        sum.must_be_complete();
    }
}

/// Seeds that showed a bug, which has been mended. A seed is the same only as long as the simulation draws the same.
#[test]
fn what_was_mended_stays_so() {
    let seed = |nth| REGRESSIONS.get(usize::try_from(nth).ok()?).map(|(seed, _)| *seed);
    let failed = sweep(seed, 8000, Limits::default()).failed;
    let again: Vec<_> = REGRESSIONS.iter().filter(|(seed, _)| failed.contains(seed)).collect();
    assert!(again.is_empty(), "mended once, and not any more: {again:#?}");
}
