//! Receipts: every upgrade leaves one, whole, and the last fifty are kept.

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::process::Command;

use jiff::Timestamp;
use reuseportd_wire::status::{MasterState, Outcome, Phase, Receipt, Status};
use serde_json::Value;

use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::client::{answer, open};
use crate::support::load::{Load, slow_accepts};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::{Done, Running, state_of};
use crate::support::world::{World, needs_of, world};

/// How many are kept.
const KEPT: usize = 50;

/// What a receipt says, and what of each listener: a promise to scripts.
const FIELDS: [&str; 14] = [
    "from",
    "to",
    "trigger",
    "outcome",
    "reason",
    "started_at",
    "duration_ms",
    "phases",
    "listeners",
    "forced_kills",
    "connections_cut",
    "superseded_by",
    "steer_back_us",
    "checks_passed",
];
const LISTENER_FIELDS: [&str; 9] = [
    "name",
    "queued_at_switch",
    "half_open_at_switch",
    "half_open_abandoned",
    "migrated",
    "migrate_failures",
    "listen_drops",
    "leftovers_taken",
    "leftovers_lost",
];

/// What a client printed: one JSON object in one line, and nothing else.
fn json(done: &Done) -> Value {
    assert_eq!(done.stdout.lines().count(), 1, "{done:#?}");
    let value: Value =
        serde_json::from_str(&done.stdout).unwrap_or_else(|error| panic!("{error}: {done:#?}"));
    assert!(value.is_object(), "{done:#?}");
    value
}

fn fields(value: &Value) -> BTreeSet<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

/// Every field is there, known or null, in a form that scripts can rely on.
fn assert_whole(receipt: &Value) {
    assert_eq!(fields(receipt), FIELDS.into(), "{receipt:#}");
    let started: Timestamp = receipt["started_at"].as_str().expect("a time of day").parse().unwrap();
    let age = Timestamp::now().duration_since(started);
    assert!(age.is_positive() && age.as_secs() < 600, "{age:?} ago: {receipt:#}");
    for listener in receipt["listeners"].as_array().expect("a list") {
        assert_eq!(fields(listener), LISTENER_FIELDS.into(), "{receipt:#}");
    }
    let typed: Receipt = serde_json::from_value(receipt.clone()).unwrap();
    assert_eq!(typed.reason.is_none(), typed.outcome == Outcome::Completed, "{receipt:#}");
    assert_eq!(typed.to.is_none(), typed.outcome == Outcome::Refused, "{receipt:#}");
    let sum: u64 = typed.phases.iter().filter(|time| time.phase != Phase::Draining).map(|time| time.ms).sum();
    // Each is rounded down.
    let rounded = typed.phases.len() as u64;
    assert!((sum..=sum + rounded).contains(&typed.duration_ms), "the phases are not the whole: {receipt:#}");
}

/// What is kept, oldest first.
fn kept(master: &Master) -> Vec<Receipt> {
    let done = master.cli("status --receipts --json");
    assert_eq!(done.code, 0, "{done:#?}");
    serde_json::from_str(&done.stdout).unwrap_or_else(|error| panic!("{error}: {done:#?}"))
}

fn a_receipt_is_whole(engine: &'static str) {
    world(needs_of(engine), |world| {
        let app = App::test_worker(world, "--accept-delay 5").engine(engine);
        let master = Master::start(world, &app);
        assert_eq!(kept(&master), [], "the first start is no upgrade");
        let load = Load::start(slow_accepts(world));
        // What is counted from one look to the next has no beginning in the first.
        master.upgrade();
        let done = master.cli("upgrade --wait=drained --json");
        load.end_lossless();
        let completed = json(&done);
        assert_whole(&completed);
        for known in ["queued_at_switch", "half_open_at_switch", "listen_drops", "migrate_failures"] {
            assert!(completed["listeners"][0][known].is_u64(), "{known}: {completed:#}");
        }
        // Without a program that migrates nobody counts that.
        assert_eq!(completed["listeners"][0]["migrated"].is_u64(), engine == "ebpf", "{completed:#}");
        assert_eq!((&completed["from"], &completed["to"]), (&2.into(), &3.into()));
        assert_eq!((&completed["connections_cut"], &completed["forced_kills"]), (&0.into(), &0.into()));
        for unknown in ["reason", "superseded_by", "steer_back_us"] {
            assert!(completed[unknown].is_null(), "{unknown}: {completed:#}");
        }
        master.stop();
    });
}

#[test]
fn a_receipt_is_whole_ebpf() {
    a_receipt_is_whole("ebpf");
}

#[test]
fn a_receipt_is_whole_cbpf() {
    a_receipt_is_whole("cbpf");
}

/// A program that prints a receipt for a script has nothing else to say on its stdout, whatever the outcome.
#[test]
fn every_outcome_is_json_and_an_exit_code() {
    world(&[], |world| {
        let app = App::test_worker(world, "");
        let master = Master::start(world, &app);
        let changed = |command: Vec<String>| {
            let mut app = app.clone();
            app.command = command;
            app.write();
        };
        let mut seen = Vec::new();
        let mut outcome = |words: &str, code: i32, outcome: &str| {
            let done = master.cli(words);
            let receipt = json(&done);
            assert_whole(&receipt);
            assert_eq!((done.code, receipt["outcome"].as_str()), (code, Some(outcome)), "{done:#?}");
            // People are told why, too.
            let reason = if code == 2 { "nonsense" } else { receipt["reason"].as_str().unwrap_or_default() };
            assert!(done.stderr.contains(reason), "{reason:?} is not in {done:#?}");
            assert!(receipt["reason"].as_str().unwrap_or_default().contains(reason), "{receipt:#}");
            seen.push(serde_json::from_value::<Receipt>(receipt).unwrap());
        };
        outcome("rollback --wait --json", 1, "refused");
        outcome("upgrade --wait --json", 0, "completed");
        outcome("rollback --wait=drained --json", 0, "completed");
        changed(test_worker("--fail exit-before-ready --code 7"));
        outcome("upgrade --wait --json", 1, "rolled_back");
        changed(vec!["/nonexistent/program".into()]);
        outcome("upgrade --wait --json", 1, "refused");
        app.write_invalid();
        outcome("upgrade --wait --json", 2, "refused");
        let outcomes = |receipts: &[Receipt]| {
            receipts.iter().map(|one| (one.outcome, one.to, one.reason.clone())).collect::<Vec<_>>()
        };
        assert_eq!(outcomes(&kept(&master)), outcomes(&seen));
        app.write();
        master.stop();
        let mut command = Command::new(REUSEPORTD);
        command.args(["upgrade", "--wait", "--json", "--config"]).arg(&app.path);
        let done = Running::start(command).finish(PATIENCE);
        assert_eq!((done.code, done.stdout.as_str()), (3, ""), "{done:#?}");
    });
}

/// Refused in no time, for a reason of its own: the number is in it.
fn refuse(master: &Master, app: &App, number: usize) -> Receipt {
    let mut app = app.clone();
    app.command = vec![format!("/nonexistent/{number}")];
    app.write();
    let (code, receipt) = master.receipt(master.cli("upgrade --wait --json"));
    assert_eq!((code, receipt.outcome), (1, Outcome::Refused), "{receipt:#?}");
    assert!(receipt.reason.as_ref().is_some_and(|reason| reason.contains(&format!("/nonexistent/{number}"))));
    receipt
}

#[test]
fn the_last_fifty_are_kept_in_order() {
    world(&[], |world| {
        let app = App::test_worker(world, "");
        let mut master = Master::start(world, &app);
        let mut all = Vec::new();
        for number in 0..KEPT + 15 {
            all.push(match number {
                20 | 63 => {
                    app.write();
                    master.upgrade()
                }
                _ => refuse(&master, &app, number),
            });
            if [KEPT - 2, KEPT - 1, KEPT].contains(&number) {
                assert_eq!(kept(&master), all[all.len().saturating_sub(KEPT)..], "{number}");
            }
        }
        let last = &all[all.len() - KEPT..];
        assert_eq!(kept(&master), last);
        assert_eq!(master.status().last_upgrade.as_ref(), last.last());
        let text = master.cli("status --receipts");
        assert_eq!(text.stdout.matches("/nonexistent/").count(), KEPT - 2, "{text:#?}");
        // The next image has them, and the next master.
        assert_eq!(master.cli("reexec").code, 0, "{}", master.log());
        assert_eq!(kept(&master), last);
        app.write();
        // A state is saved at the end of a turn, but not after each of them.
        let words = format!("/nonexistent/{}", KEPT + 14);
        master.wait_status("kept", |_| state_of(master.app()).contains(&words));
        master.kill();
        master.restart();
        master.wait_adopted();
        assert_eq!(kept(&master), last);
        master.stop();
    });
}

/// A receipt without its end: the open connection of an old worker goes on.
fn draining(world: &World, master: &Master) -> (TcpStream, Receipt) {
    let client = open(world);
    let accepted = |status: &Status| {
        let active = status.generations.iter().filter(|one| Some(one.generation) == status.active_generation);
        active.map(|one| one.connections).eq([Some(1)])
    };
    master.wait_status("accepted", accepted);
    let (code, receipt) = master.receipt(master.cli("upgrade --wait --json"));
    assert_eq!((code, receipt.outcome), (0, Outcome::Completed), "{receipt:#?}");
    assert_eq!(has_drained(&receipt), None, "{receipt:#?}");
    assert_eq!(kept(master).last(), Some(&receipt));
    (client, receipt)
}

/// How long it drained, once that is over.
fn has_drained(receipt: &Receipt) -> Option<u64> {
    receipt.phases.iter().find(|time| time.phase == Phase::Draining).map(|time| time.ms)
}

/// The receipt of the upgrade to this generation, once it is final.
fn finished(master: &Master, to: Option<u32>) -> Receipt {
    let find = || kept(master).into_iter().find(|one| one.to == to && has_drained(one).is_some());
    master.wait_status("a final receipt", |_| find().is_some());
    find().expect("just seen")
}

#[test]
fn a_receipt_is_completed_when_the_old_workers_are_gone() {
    world(&[], |world| {
        let app =
            App::test_worker(world, "").upgrade("stop_when = \"drained\"").upgrade("drain_timeout = \"1h\"");
        let mut master = Master::start(world, &app);
        let (client, first) = draining(world, &master);
        // What comes meanwhile does not push it out of its place, nor does another image or master.
        let refused = refuse(&master, &app, 1);
        assert_eq!(master.cli("reexec").code, 0, "{}", master.log());
        assert!(answer(client).contains("generation=1"));
        let mut done = finished(&master, first.to);
        assert_eq!(kept(&master), [done.clone(), refused]);
        done.phases.pop();
        assert_eq!(done, first, "only the end was missing");

        app.write();
        let (client, second) = draining(world, &master);
        let shown = "\"to\":3,\"trigger\":\"command\",\"outcome\":\"completed\"";
        master.wait_status("kept", |_| state_of(master.app()).contains(shown));
        master.kill();
        master.restart();
        master.wait_adopted();
        assert!(answer(client).contains("generation=2"));
        let mut done = finished(&master, second.to);
        done.phases.pop();
        assert_eq!(done, second);
        master.stop();
    });
}

#[test]
fn connections_that_are_cut_are_counted() {
    world(&[], |world| {
        let app = App::test_worker(world, "").workers(2).upgrade("stop_when = \"drained\"");
        let app = app.upgrade("drain_timeout = \"1s\"");
        let master = Master::start(world, &app);
        let clients: Vec<TcpStream> = (0..3).map(|_| open(world)).collect();
        master.wait_status("accepted", |status| status.generations[0].connections == Some(3));
        let waiting = master.begin("upgrade --wait=drained --json");
        let (code, receipt) = master.receipt(waiting.finish(PATIENCE));
        assert_eq!((code, receipt.outcome), (0, Outcome::Completed), "{receipt:#?}");
        assert_eq!(receipt.connections_cut, Some(3), "{receipt:#?}");
        assert!((1..=2).contains(&receipt.forced_kills), "{receipt:#?}");
        assert!(has_drained(&receipt).is_some(), "{receipt:#?}");
        assert_eq!(kept(&master), [receipt]);
        drop(clients);
        master.stop();
    });
}

/// However many come while it drains: it is still there for who waits for it, and no later upgrade.
#[test]
fn a_receipt_that_is_not_final_outlasts_fifty_others() {
    world(&[], |world| {
        let app =
            App::test_worker(world, "").upgrade("stop_when = \"drained\"").upgrade("drain_timeout = \"1h\"");
        let master = Master::start(world, &app);
        let client = open(world);
        master.wait_status("accepted", |status| status.generations[0].connections == Some(1));
        let waiting = master.begin("upgrade --wait=drained --json");
        master.wait_status("upgraded", |status| {
            status.active_generation == Some(2) && status.state == MasterState::Steady
        });
        let refused: Vec<Receipt> = (0..KEPT + 1).map(|number| refuse(&master, &app, number)).collect();
        assert_eq!(kept(&master).last(), refused.last());
        answer(client);
        let (code, receipt) = master.receipt(waiting.finish(PATIENCE));
        assert_eq!((code, receipt.to), (0, Some(2)), "{receipt:#?}");
        assert!(has_drained(&receipt).is_some(), "{receipt:#?}");
        assert_eq!(
            master.status().last_upgrade.as_ref(),
            refused.last(),
            "an old receipt has become the last"
        );
        let all = kept(&master);
        assert_eq!((all.len(), all.first()), (KEPT, Some(&receipt)), "not in order");
        master.stop();
    });
}
