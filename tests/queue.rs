//! Wishes for an upgrade that come while one is under way: the latest wins, and everybody is answered.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use reuseportd_wire::status::{MasterState, Outcome, Receipt, Status, Trigger};
use rustix::process::Signal;

use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::client::Held;
use crate::support::load::{Load, slow_accepts};
use crate::support::master::Master;
use crate::support::process::{Done, Running, state_of};
use crate::support::world::{World, needs_of, world};
use crate::upgrade::control_loses;

/// Callers, and how often each of them calls.
const CALLERS: u32 = 10;
const CALLS: u32 = 5;
/// From one call of a caller to the next: 50 triggers in 5 s.
const PACE: Duration = Duration::from_millis(1000);

const UPGRADE: &str = "upgrade --wait --json";

/// The app as the wish of this number wants it: its workers print the number when they start.
fn wished(app: &App, number: u32) -> App {
    let mut app = app.clone();
    app.command.extend(["--print".into(), format!("wish-{number}.")]);
    app
}

/// Puts the config in place as a whole: somebody reads it at any time.
fn put(app: &App) {
    let place = app.path.clone();
    let mut next = app.clone();
    next.path = place.with_extension("next");
    next.write();
    fs::rename(&next.path, place).unwrap();
}

/// Of each generation the wish that its workers have printed.
fn wishes(world: &World) -> BTreeMap<u32, u32> {
    let text = world.read("master.out");
    let pairs = text.lines().filter_map(|line| {
        let (tag, words) = line.strip_prefix("[g")?.split_once(' ')?;
        let (_, wish) = words.split_once("wish-")?;
        Some((tag.parse().ok()?, wish.strip_suffix('.')?.parse().ok()?))
    });
    pairs.collect()
}

/// What `--json` printed: one receipt and nothing else. Who asked for it finds out by the exit code alone, too.
fn only_a_receipt(done: &Done) -> Receipt {
    let receipt = serde_json::from_str(&done.stdout);
    receipt.unwrap_or_else(|error| panic!("{error}: not one JSON object and nothing else: {done:#?}"))
}

/// Each caller calls in his rhythm, and each call comes with a config of its own: the number of the wish, and who waits
/// for it if it was no signal.
fn storm(master: &Master, app: &App) -> Vec<(u32, Option<Running>)> {
    let calls = Mutex::new(Vec::new());
    let call = |is_signal: bool| {
        let mut calls = calls.lock().unwrap();
        let wish = u32::try_from(calls.len()).unwrap() + 2;
        put(&wished(app, wish));
        let waiting = (!is_signal).then(|| master.begin(UPGRADE));
        if is_signal {
            master.signal(Signal::HUP);
        }
        calls.push((wish, waiting));
    };
    thread::scope(|scope| {
        for caller in 0..CALLERS {
            let call = &call;
            scope.spawn(move || {
                thread::sleep(PACE / CALLERS * caller); // they do not call in unison
                for turn in 0..CALLS {
                    call(turn == caller % CALLS);
                    thread::sleep(PACE); // the rhythm is the test's
                }
            });
        }
    });
    calls.into_inner().unwrap()
}

fn storms_become_few_upgrades(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let app = App::test_worker(world, &format!("--mode {mode} --accept-delay 5")).engine(engine);
        let master = Master::start(world, &wished(&app, 1));
        let load = Load::start(slow_accepts(world));
        let begun = Instant::now();
        let calls = storm(&master, &app);
        let all = calls.len();
        assert_eq!(all, (CALLERS * CALLS) as usize);
        let last = calls.last().map(|(wish, _)| *wish);
        let done: Vec<(u32, Done)> =
            calls.into_iter().filter_map(|(wish, waiting)| Some((wish, waiting?.finish(PATIENCE)))).collect();
        let status = master.wait_status("quiet", is_quiet);
        let elapsed = begun.elapsed();
        let active = status.active_generation.unwrap_or_default();
        load.answered_by(active);

        let upgrades = u64::from(active - 1);
        // A wish that came meanwhile begins a second after the upgrade before it: so many fit in.
        assert!(upgrades <= 8.max(elapsed.as_secs() + 2), "{upgrades} in {elapsed:?}\n{}", master.log());
        let wishes = wishes(world);
        assert_eq!(wishes.get(&active).copied(), last, "the last config has not won: {wishes:?}");
        let mut superseded = 0;
        for (wish, done) in &done {
            let receipt = only_a_receipt(done);
            assert_eq!((done.code, receipt.outcome), (0, Outcome::Completed), "{done:#?}\n{}", master.log());
            let to = receipt.to.expect("a completed upgrade has a new generation");
            assert!(wishes.get(&to) >= Some(wish), "{wish} got {to} of {wishes:?}: older than the wish");
            if let Some(by) = receipt.superseded_by {
                assert_eq!(by, to, "{receipt:#?}");
                superseded += 1;
            }
        }
        let own = done.len() - superseded;
        assert!(own as u64 <= upgrades, "{own} have an upgrade of their own, and there were {upgrades}");
        eprintln!(
            "{engine} {mode}: {all} triggers, {upgrades} upgrades in {elapsed:?}, {superseded} superseded"
        );
        load.end_lossless();
        master.stop();
    });
}

#[test]
fn storms_become_few_upgrades_sdk_ebpf() {
    storms_become_few_upgrades("ebpf", "sdk");
}

#[test]
fn storms_become_few_upgrades_unmodified_cbpf() {
    storms_become_few_upgrades("cbpf", "plain");
}

#[test]
fn the_same_load_shows_losses() {
    world(&[], |world| control_loses(world, slow_accepts(world), 5));
}

/// A service whose upgrade to generation 2 is under way, and stays so until the held clients are answered.
struct Scene<'a> {
    world: &'a World,
    app: App,
    master: Master<'a>,
    first: Option<Running>,
    held: Option<Held>,
}

impl<'a> Scene<'a> {
    fn new(world: &'a World) -> Scene<'a> {
        let app = App::test_worker(world, "--mode plain --inline").workers(1);
        let master = Master::start(world, &wished(&app, 1));
        let held = Some(Held::open(world, &master));
        put(&wished(&app, 2));
        let first = Some(master.begin(UPGRADE));
        master.wait_status("retiring", |status| status.state == MasterState::Retiring);
        Scene { world, app, master, first, held }
    }

    /// A wish that waits behind the upgrade, with this config.
    fn wish(&self, app: &App, words: &str) -> Running {
        let superseded = || self.master.log().matches("event=\"superseded\"").count();
        let (before, is_first) = (superseded(), !self.master.status().upgrade_waits);
        put(app);
        let caller = self.master.begin(words);
        let waits = |waits| waits && (is_first || superseded() > before);
        self.master.wait_status("waiting", |status| waits(status.upgrade_waits));
        caller
    }

    /// The upgrade to generation 2 can end, and who waits for it is answered.
    fn release(&mut self) {
        self.held.take().expect("released once").release(1);
        let (code, receipt, _) = ended(self.first.take().expect("ended once"));
        let so = (code, receipt.outcome, receipt.to, receipt.superseded_by);
        assert_eq!(so, (0, Outcome::Completed, Some(2), None), "{receipt:#?}");
    }

    /// Waits until nothing is under way; who serves, and by whose wish.
    fn quiet(&self) -> (u32, Option<u32>) {
        let status = self.master.wait_status("quiet", is_quiet);
        let active = status.active_generation.unwrap_or_default();
        (active, wishes(self.world).get(&active).copied())
    }
}

fn is_quiet(status: &Status) -> bool {
    status.state == MasterState::Steady && !status.upgrade_waits
}

/// A caller's exit code, the receipt it printed, and what it said besides.
fn ended(caller: Running) -> (i32, Receipt, String) {
    let done = caller.finish(PATIENCE);
    (done.code, only_a_receipt(&done), done.stderr)
}

#[test]
fn the_superseded_get_the_failure_of_their_successor() {
    world(&[], |world| {
        let mut scene = Scene::new(world);
        let earlier = scene.wish(&wished(&scene.app, 3), UPGRADE);
        let mut broken = scene.app.clone();
        broken.command = test_worker("--fail exit-before-ready --code 7");
        let later = scene.wish(&broken, UPGRADE);
        scene.release();
        for (caller, superseded_by) in [(earlier, Some(3)), (later, None)] {
            let (code, receipt, said) = ended(caller);
            assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
            assert_eq!((receipt.to, receipt.superseded_by), (Some(3), superseded_by), "{receipt:#?}");
            let reason = receipt.reason.expect("a failure has a reason");
            assert!(reason.contains("status 7") && said.contains(&reason), "{reason:?} {said:?}");
        }
        assert_eq!(scene.quiet(), (2, Some(2)));
        // What was prepared for them is not taken for the next.
        put(&wished(&scene.app, 4));
        scene.master.upgrade();
        assert_eq!(scene.quiet(), (4, Some(4)));
        scene.master.stop();
    });
}

#[test]
fn an_invalid_config_does_not_take_the_place_of_a_waiting_wish() {
    world(&[], |world| {
        let mut scene = Scene::new(world);
        let waiting = scene.wish(&wished(&scene.app, 3), UPGRADE);
        scene.app.write_invalid();
        let (code, receipt, said) = ended(scene.master.begin(UPGRADE));
        assert_eq!((code, receipt.outcome, receipt.to), (2, Outcome::Refused, None), "{receipt:#?}");
        assert!(said.contains("nonsense"), "{said}");
        scene.master.signal(Signal::HUP);
        let refusals = |_: &Status| scene.master.log().matches("event=\"upgrade_refused\"").count() == 2;
        assert!(scene.master.wait_status("refused again", refusals).upgrade_waits);
        scene.release();
        let (code, receipt, _) = ended(waiting);
        assert_eq!((code, receipt.to, receipt.superseded_by), (0, Some(3), None), "{receipt:#?}");
        assert_eq!(scene.quiet(), (3, Some(3)), "not as the config was when it was asked for");
        scene.master.stop();
    });
}

#[test]
fn who_does_not_wait_any_longer_stops_nothing() {
    world(&[], |world| {
        let mut scene = Scene::new(world);
        let waiting = scene.wish(&wished(&scene.app, 3), "upgrade --wait --json --timeout 100ms");
        let done = waiting.finish(PATIENCE);
        assert_eq!((done.code, done.stdout.as_str()), (4, ""), "{done:#?}");
        assert!(done.stderr.contains("--timeout"), "{done:#?}");
        scene.release();
        assert_eq!(scene.quiet(), (3, Some(3)));
        let held = Held::open(world, &scene.master);
        put(&wished(&scene.app, 4));
        let done = scene.master.cli("upgrade --wait --json --timeout 100ms");
        assert_eq!((done.code, done.stdout.as_str()), (4, ""), "{done:#?}");
        held.release(3);
        assert_eq!(scene.quiet(), (4, Some(4)));
        scene.master.stop();
    });
}

#[test]
fn a_rollback_takes_the_place_of_a_waiting_upgrade() {
    world(&[], |world| {
        let mut scene = Scene::new(world);
        let upgrade = scene.wish(&wished(&scene.app, 3), UPGRADE);
        let rollback = scene.wish(&wished(&scene.app, 3), "rollback --wait --json");
        let waiting = scene.master.cli("status");
        assert!(waiting.stdout.contains("an upgrade waits"), "{waiting:#?}");
        scene.release();
        for (caller, superseded_by) in [(upgrade, Some(3)), (rollback, None)] {
            let (code, receipt, _) = ended(caller);
            assert_eq!((code, receipt.outcome, receipt.trigger), (0, Outcome::Completed, Trigger::Rollback));
            assert_eq!((receipt.to, receipt.superseded_by), (Some(3), superseded_by), "{receipt:#?}");
        }
        assert_eq!(scene.quiet(), (3, Some(1)));
        scene.master.stop();
    });
}

/// `rollback` means whatever is new: what starts, and what would come after it.
#[test]
fn a_rollback_of_what_starts_takes_the_waiting_wish_too() {
    world(&[], |world| {
        let app = App::test_worker(world, "").workers(1).upgrade("ready_timeout = \"1h\"");
        let master = Master::start(world, &wished(&app, 1));
        let mut slow = app.clone();
        slow.command = test_worker("--fail never-ready");
        put(&slow);
        let first = master.begin(UPGRADE);
        master.wait_status("launching", |status| status.state == MasterState::Launching);
        put(&wished(&app, 3));
        let waiting = master.begin(UPGRADE);
        master.wait_status("waiting", |status| status.upgrade_waits);
        let (code, receipt, _) = ended(master.begin("rollback --wait --json"));
        assert_eq!((code, receipt.outcome, receipt.to), (0, Outcome::RolledBack, Some(2)), "{receipt:#?}");
        for (caller, superseded_by) in [(first, None), (waiting, Some(2))] {
            let (code, receipt, said) = ended(caller);
            assert_eq!(
                (code, receipt.outcome, receipt.to),
                (1, Outcome::RolledBack, Some(2)),
                "{receipt:#?}"
            );
            assert_eq!(receipt.superseded_by, superseded_by);
            assert!(said.contains("taken back"), "{said}");
        }
        let status = master.wait_status("quiet", is_quiet);
        assert_eq!(status.active_generation, Some(1));
        // What was prepared for the waiting one is not taken for the next.
        put(&wished(&app, 4));
        let to = master.upgrade().to.expect("of a completed upgrade");
        assert_eq!(wishes(world).get(&to), Some(&4));
        master.stop();
    });
}

#[test]
fn a_stop_answers_who_waits() {
    world(&[], |world| {
        let mut scene = Scene::new(world);
        let earlier = scene.wish(&wished(&scene.app, 3), UPGRADE);
        let later = scene.wish(&wished(&scene.app, 4), UPGRADE);
        scene.master.signal(Signal::TERM);
        for caller in [earlier, later] {
            let (code, receipt, said) = ended(caller);
            assert_eq!((code, receipt.outcome, receipt.to), (1, Outcome::Refused, None), "{receipt:#?}");
            assert!(said.contains("the master is stopping"), "{said}");
        }
        let too_late = scene.master.cli(UPGRADE);
        assert_eq!(too_late.code, 1, "{too_late:#?}");
        // The one under way is past its switch, and ends.
        scene.release();
        scene.master.ended(0);
    });
}

/// Whether the next master would know of a wish that waits.
fn is_wish_kept(master: &Master) -> bool {
    state_of(master.app()).contains("\"wish\":{")
}

/// The next master goes on with what waits; who waited for it is told that the master ended.
#[test]
fn a_wish_outlives_the_master() {
    world(&[], |world| {
        let mut scene = Scene::new(world);
        let waiting = scene.wish(&wished(&scene.app, 3), UPGRADE);
        scene.master.wait_status("kept", |_| is_wish_kept(&scene.master));
        scene.master.kill();
        for caller in [waiting, scene.first.take().expect("it waits")] {
            let done = caller.finish(PATIENCE);
            assert_eq!((done.code, done.stdout.as_str()), (1, ""), "{done:#?}");
            assert!(done.stderr.contains("the master ended"), "{done:#?}");
        }
        scene.master.restart();
        let status = scene.master.wait_adopted();
        assert_eq!((status.state, status.upgrade_waits), (MasterState::Retiring, true), "{status:#?}");
        scene.held.take().expect("still held").release(1);
        assert_eq!(scene.quiet(), (3, Some(3)), "{}", scene.master.log());
        scene.master.upgrade();
        scene.master.stop();
    });
}

/// The same in the pause before a wish that came meanwhile.
#[test]
fn a_wish_in_its_pause_outlives_the_master() {
    world(&[], |world| {
        let app = App::test_worker(world, "--ready-delay 200");
        let mut master = Master::start(world, &wished(&app, 1));
        put(&wished(&app, 2));
        master.signal(Signal::HUP);
        // On a machine that is too slow for that the one is over, or the next has begun: then there is no pause to see.
        let is_over = |status: &Status| status.active_generation == Some(2);
        let has_begun = |status: &Status| status.generations.iter().any(|one| one.generation == 3);
        let launches = |status: &Status| status.state == MasterState::Launching;
        master.wait_status("launching", |status| launches(status) || is_over(status));
        put(&wished(&app, 3));
        master.signal(Signal::HUP);
        master.wait_status("kept", |status| is_wish_kept(&master) || has_begun(status));
        let pauses = |status: &Status| status.state == MasterState::Steady && status.upgrade_waits;
        master.wait_status("pause", |status| pauses(status) || has_begun(status));
        master.kill();
        master.restart();
        master.wait_adopted();
        let status =
            master.wait_status("quiet", |status| is_quiet(status) && status.active_generation > Some(2));
        let active = status.active_generation.unwrap_or_default();
        assert_eq!(wishes(world).get(&active), Some(&3), "{}", master.log());
        master.upgrade();
        master.stop();
    });
}
