//! The subcommands against a master that is a thread with a script, and the pictures they draw.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use reuseportd_wire::control::{REPLY_BYTES_MAX, decode_reply, decode_request};
use reuseportd_wire::status::{GenerationState, Phase, Receipt, Status, Trigger, WorkerState};

use super::*;

const PATIENT: Patience = Patience { answer: Duration::from_secs(10), whole: None };
const HASTY: Patience = Patience { answer: Duration::from_millis(50), whole: None };

/// What a master does after it has read the request.
enum Then {
    Close,
    /// Keeps the connection until the client closes it.
    Stay,
}

struct FakeMaster {
    _directory: tempfile::TempDir,
    socket: PathBuf,
    thread: JoinHandle<Request>,
}

impl FakeMaster {
    fn says(replies: &'static str, then: Then) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut line = Vec::new();
            reader.read_until(b'\n', &mut line).unwrap();
            (&stream).write_all(replies.as_bytes()).unwrap();
            if matches!(then, Then::Stay) {
                assert_eq!(reader.read_until(b'\n', &mut Vec::new()).unwrap(), 0, "one request only");
            }
            decode_request(&line).unwrap()
        });
        Self { _directory: directory, socket, thread }
    }

    /// What the client was asked, and how it took the answer: exit code with error, and its stdout.
    fn hears(self, ask: impl FnOnce(&Path, &mut Vec<u8>) -> Result<(), ClientError>) -> (Request, Ended) {
        let mut out = Vec::new();
        let ended = end(ask(&self.socket, &mut out));
        (self.thread.join().unwrap(), Ended { out: String::from_utf8(out).unwrap(), ..ended })
    }
}

#[derive(Debug)]
struct Ended {
    code: u8,
    error: String,
    out: String,
}

fn end(result: Result<(), ClientError>) -> Ended {
    let (code, error) = match result {
        Ok(()) => (0, String::new()),
        Err(error) => (error.exit_code(), error.to_string()),
    };
    Ended { code, error, out: String::new() }
}

fn upgrade(wait: Option<WaitFor>) -> Request {
    Request::Upgrade { wait: wait_for(wait), force: false }
}

fn upgraded(replies: &'static str, then: Then, wait: Option<WaitFor>, json: bool) -> (Request, Ended) {
    FakeMaster::says(replies, then)
        .hears(|socket, out| ask_for_receipt(socket, &upgrade(wait), wait.is_some(), json, PATIENT, out))
}

fn rolled_back(replies: &'static str, json: bool) -> Ended {
    let request = Request::Rollback { wait: Wait::Retired };
    let (heard, ended) = FakeMaster::says(replies, Then::Close)
        .hears(|socket, out| ask_for_receipt(socket, &request, true, json, PATIENT, out));
    assert_eq!(heard, request);
    ended
}

const COMPLETED: &str = concat!(
    r#"{"reply":"accepted"}"#,
    "\n",
    r#"{"reply":"progress","state":"launching","text":"3 of 4 ready","ready":3,"of":4}"#,
    "\n",
    r#"{"reply":"receipt","receipt":{"from":3,"to":4,"trigger":"command","outcome":"completed","reason":null,"started_at":"2026-11-22T10:00:00Z","duration_ms":1812,"phases":[{"phase":"launching","ms":1640},{"phase":"switch","ms":0},{"phase":"retiring","ms":172}],"listeners":[{"name":"http","queued_at_switch":3,"half_open_at_switch":1,"half_open_abandoned":2,"migrated":null,"migrate_failures":0,"listen_drops":0,"leftovers_taken":0,"leftovers_lost":0}],"forced_kills":1,"connections_cut":null}}"#,
    "\n"
);

const ROLLED_BACK: &str = concat!(
    r#"{"reply":"receipt","receipt":{"from":3,"to":4,"trigger":"command","outcome":"rolled_back","reason":"worker 0: exit status 7\nlast output: \u001b[2Jno","started_at":"2026-11-22T10:00:00Z","duration_ms":81,"phases":[{"phase":"launching","ms":81}],"listeners":[{"name":"http","queued_at_switch":null,"half_open_at_switch":null,"migrated":0,"migrate_failures":0,"listen_drops":null}],"forced_kills":0,"connections_cut":0}}"#,
    "\n"
);

#[test]
fn an_upgrade_without_wait_ends_when_it_is_accepted() {
    let (request, ended) = upgraded("{\"reply\":\"accepted\"}\n", Then::Stay, None, false);
    assert_eq!(request, Request::Upgrade { wait: Wait::None, force: false });
    assert_eq!((ended.code, ended.out.as_str()), (0, "upgrade accepted\n"));
    let (_, ended) = upgraded("{\"reply\":\"accepted\"}\n", Then::Stay, None, true);
    assert_eq!((ended.code, ended.out.as_str()), (0, ""), "nothing but JSON on stdout");
}

#[test]
fn an_upgrade_with_wait_ends_with_the_receipt() {
    let (request, ended) = upgraded(COMPLETED, Then::Stay, Some(WaitFor::Drained), false);
    assert_eq!(request, Request::Upgrade { wait: Wait::Drained, force: false });
    assert_eq!(ended.code, 0, "{ended:?}");
    let picture = "\
upgrade from generation 3 to 4: completed in 1.8 s (by command, 2026-11-22T10:00:00Z)
  launching 1.6 s, switch 0 ms, retiring 172 ms
  LISTENER  QUEUED  HALF-OPEN  ABANDONED  MIGRATED  FAILED  DROPPED  TAKEN  LOST
  http           3          1          2         ?       0        0      0     0
  1 worker killed, ? open connections cut
";
    assert_eq!(ended.out, picture);
}

#[test]
fn the_json_of_a_receipt_is_all_that_stdout_gets() {
    let (_, ended) = upgraded(COMPLETED, Then::Close, Some(WaitFor::Retired), true);
    let receipt: Receipt = serde_json::from_str(&ended.out).unwrap();
    assert_eq!((ended.code, receipt.to), (0, Some(4)));
}

#[test]
fn an_upgrade_that_failed_is_told_with_its_reason_and_exit_code_1() {
    for json in [false, true] {
        let (_, ended) = upgraded(ROLLED_BACK, Then::Close, Some(WaitFor::Retired), json);
        assert_eq!(ended.code, 1);
        let said = "upgrade rolled back: worker 0: exit status 7\nlast output: \\u{1b}[2Jno";
        assert_eq!(ended.error, said, "terminal escapes are harmless");
        assert!(ended.out.contains(if json { "rolled_back" } else { "rolled back in 81 ms" }), "{ended:?}");
        assert!(json || !ended.out.contains("LISTENER"), "nothing happened to the listeners: {ended:?}");
    }
}

/// Taken back while it was tried: what `rollback` asked for, and a failure for who asked for the upgrade.
const TAKEN_BACK: &str = concat!(
    r#"{"reply":"receipt","code":0,"receipt":{"from":3,"to":4,"trigger":"command","outcome":"rolled_back","reason":"a rollback was asked for","started_at":"2026-11-22T10:00:00Z","duration_ms":12000,"phases":[{"phase":"launching","ms":1000},{"phase":"canary","ms":11000}],"listeners":[],"forced_kills":0,"connections_cut":0,"steer_back_us":312,"checks_passed":1}}"#,
    "\n"
);

#[test]
fn a_rollback_is_done_when_the_master_says_so() {
    let ended = rolled_back(TAKEN_BACK, false);
    assert_eq!((ended.code, ended.error.as_str()), (0, ""));
    let picture = "\
upgrade from generation 3 to 4: rolled back in 12.0 s (by command, 2026-11-22T10:00:00Z)
  launching 1.0 s, canary 11.0 s
  1 check passed, steered back in 312 µs
  a rollback was asked for
";
    assert_eq!(ended.out, picture);
    let ended = rolled_back(TAKEN_BACK, true);
    let receipt: Receipt = serde_json::from_str(&ended.out).unwrap();
    assert_eq!((ended.code, receipt.steer_back_us), (0, Some(312)));
    let failed: &'static str = TAKEN_BACK.replace(r#""code":0"#, r#""code":1"#).leak();
    let ended = rolled_back(failed, false);
    assert_eq!((ended.code, ended.error.as_str()), (1, "upgrade rolled back: a rollback was asked for"));
    let ended = rolled_back(failed.replace(r#""command""#, r#""rollback""#).leak(), false);
    assert_eq!((ended.code, ended.error.as_str()), (1, "rollback failed: a rollback was asked for"));
    assert!(ended.out.starts_with("rollback from generation 3 to 4: rolled back in"), "{ended:?}");
    let refusal = "{\"reply\":\"error\",\"message\":\"there is no generation before this one\"}\n";
    let ended = rolled_back(refusal, true);
    assert_eq!((ended.code, ended.out.as_str()), (1, ""), "{ended:?}");
    let request = Request::Rollback { wait: Wait::None };
    for (json, said) in [(false, "rollback accepted\n"), (true, "")] {
        let (_, ended) = FakeMaster::says("{\"reply\":\"accepted\"}\n", Then::Stay)
            .hears(|socket, out| ask_for_receipt(socket, &request, false, json, PATIENT, out));
        assert_eq!((ended.code, ended.out.as_str()), (0, said));
    }
}

#[test]
fn an_upgrade_is_done_only_when_it_completed_and_the_master_says_so() {
    let wait = Some(WaitFor::Retired);
    // The default of a master that knows no code.
    assert_eq!(upgraded(TAKEN_BACK, Then::Close, wait, false).1.code, 1);
    let failed: &'static str = COMPLETED.replace(r#""receipt","#, r#""receipt","code":1,"#).leak();
    assert_ne!(failed, COMPLETED);
    assert_eq!(upgraded(failed, Then::Close, wait, false).1.code, 1);
}

#[test]
fn a_wish_that_was_superseded_gets_its_successors_receipt_and_exit_code() {
    let by = |replies: &str| -> &'static str {
        replies.replace(r#""forced_kills""#, r#""superseded_by":6,"forced_kills""#).leak()
    };
    let first = "superseded by generation 6, whose receipt this is:\nupgrade from generation 3 to 4: ";
    for (replies, code) in [(by(COMPLETED), 0), (by(ROLLED_BACK), 1)] {
        let (_, ended) = upgraded(replies, Then::Close, Some(WaitFor::Retired), false);
        assert_eq!(ended.code, code);
        assert!(ended.out.starts_with(first), "{ended:?}");
        let (_, ended) = upgraded(replies, Then::Close, Some(WaitFor::Retired), true);
        let receipt: Receipt = serde_json::from_str(&ended.out).unwrap();
        assert_eq!((ended.code, receipt.superseded_by), (code, Some(6)));
    }
}

#[test]
fn scaling_and_restarts_are_accepted_or_done() {
    const ACCEPTED: &str = "{\"reply\":\"accepted\"}\n";
    const DONE: &str = concat!(
        "{\"reply\":\"accepted\"}\n",
        r#"{"reply":"progress","state":"launching","text":"1 of 2 ready","ready":1,"of":2}"#,
        "\n{\"reply\":\"done\"}\n"
    );
    const REFUSED: &str = "{\"reply\":\"error\",\"message\":\"an upgrade runs\"}\n";
    for (wait, replies, [scaled, restarted], code) in [
        (false, ACCEPTED, ["scale accepted\n", "restart accepted\n"], 0),
        (true, DONE, ["scaled to 4\n", "worker of seat 2 restarted\n"], 0),
        (true, ACCEPTED, ["", ""], 1),
        (true, REFUSED, ["", ""], 1),
        (true, COMPLETED, ["", ""], 1),
    ] {
        let master = FakeMaster::says(replies, Then::Close);
        let (request, ended) = master.hears(|socket, out| ask_scale(socket, 4, wait, PATIENT, out));
        assert_eq!(request, Request::Scale { workers: 4, wait });
        assert_eq!((ended.code, ended.out.as_str()), (code, scaled), "{ended:?}");
        let master = FakeMaster::says(replies, Then::Close);
        let (request, ended) = master.hears(|socket, out| ask_restart_worker(socket, 2, wait, PATIENT, out));
        assert_eq!(request, Request::RestartWorker { seat: 2, wait });
        assert_eq!((ended.code, ended.out.as_str()), (code, restarted), "{ended:?}");
    }
    let patience = Patience { whole: Some(Duration::from_millis(60)), ..PATIENT };
    let slow = FakeMaster::says(ACCEPTED, Then::Stay);
    let (_, ended) = slow.hears(|socket, out| ask_scale(socket, 4, true, patience, out));
    assert_eq!(ended.code, 4, "{ended:?}");
}

#[test]
fn receipts_are_shown_as_a_table_or_as_an_array() {
    let of = |line: &str| line.lines().last().unwrap().to_owned();
    let receipt = |replies| match decode_reply(of(replies).as_bytes()).unwrap() {
        Reply::Receipt { receipt, .. } => *receipt,
        reply => panic!("{reply:?}"),
    };
    let first = Receipt { from: None, to: Some(3), trigger: Trigger::Start, ..receipt(COMPLETED) };
    let receipts = vec![first, receipt(ROLLED_BACK), Receipt { to: None, ..receipt(TAKEN_BACK) }];
    let line = encode(&Reply::Receipts { receipts: receipts.clone() }).unwrap().leak();
    let show = |replies, json| {
        let master = FakeMaster::says(replies, Then::Close);
        master.hears(|socket, out| show_receipts(socket, json, PATIENT, out))
    };
    let (request, ended) = show(line, false);
    assert_eq!((request, ended.code), (Request::Receipts {}, 0));
    let picture = "\
STARTED               FROM  TO  BY       OUTCOME        TOOK
2026-11-22T10:00:00Z     -   3  start    completed     1.8 s
2026-11-22T10:00:00Z     3   4  command  rolled back   81 ms
  worker 0: exit status 7
  last output: \\u{1b}[2Jno
2026-11-22T10:00:00Z     3   -  command  rolled back  12.0 s
  a rollback was asked for
";
    assert_eq!(ended.out, picture);
    let (_, ended) = show(line, true);
    assert_eq!(serde_json::from_str::<Vec<Receipt>>(&ended.out).unwrap(), receipts);
    let none = "{\"reply\":\"receipts\",\"receipts\":[]}\n";
    assert_eq!(show(none, false).1.out, "no upgrade yet\n");
    assert_eq!(show(none, true).1.out, "[]\n");
    assert_eq!(show("{\"reply\":\"done\"}\n", false).1.code, 1);
}

#[test]
fn a_refusal_brings_its_exit_code() {
    let codes = [
        (r#"{"reply":"error","message":"config invalid","code":2}"#, 2),
        (r#"{"reply":"error","message":"config invalid"}"#, 1),
        (r#"{"reply":"error","message":"config invalid","code":0}"#, 1),
    ];
    for (reply, code) in codes {
        let (_, ended) = upgraded(reply, Then::Close, Some(WaitFor::Retired), false);
        assert_eq!(ended.code, 1, "a line without its end was cut off: {ended:?}");
        let reply: &'static str = format!("{reply}\n").leak();
        let (_, ended) = upgraded(reply, Then::Close, Some(WaitFor::Retired), false);
        assert_eq!((ended.code, ended.error.as_str()), (code, "config invalid"));
    }
}

#[test]
fn a_master_that_goes_away_or_talks_nonsense_is_a_failure() {
    let wait = Some(WaitFor::Retired);
    for (replies, said) in [
        ("", "closed before the answer"),
        ("{\"reply\":\"accepted\"}\n", "the master ended before"),
        ("{\"reply\":\"done\"}\n", "another question"),
        ("hello\n", "not understood"),
    ] {
        let (_, ended) = upgraded(replies, Then::Close, wait, false);
        assert_eq!((ended.code, ended.out.as_str()), (1, ""), "{replies}");
        assert!(ended.error.contains(said), "{replies}: {ended:?}");
    }
    let endless: &'static str = "x".repeat(REPLY_BYTES_MAX + 1).leak();
    let (_, ended) = upgraded(endless, Then::Stay, wait, false);
    assert_eq!(ended.code, 1);
    assert!(ended.error.contains("more than the"), "{ended:?}");
}

#[test]
fn a_silent_master_ends_the_wait() {
    let silent = FakeMaster::says("", Then::Stay);
    let (_, ended) = silent.hears(|socket, out| show_status(socket, false, HASTY, out));
    assert_eq!(ended.code, 1);
    assert!(ended.error.contains("no answer within 50 ms"), "{ended:?}");
    // Once it has taken the wish, only --timeout is a limit.
    let whole = Some(Duration::from_millis(120));
    let patience = Patience { whole, ..HASTY };
    let slow = FakeMaster::says("{\"reply\":\"accepted\"}\n", Then::Stay);
    let began = Instant::now();
    let (_, ended) = slow.hears(|socket, out| {
        ask_for_receipt(socket, &upgrade(Some(WaitFor::Retired)), true, false, patience, out)
    });
    assert_eq!(ended.code, 4);
    assert!(began.elapsed() >= Duration::from_millis(120));
    assert!(ended.error.contains("--timeout of 120 ms passed"), "{ended:?}");
}

#[test]
fn a_master_that_accepts_nobody_ends_the_wait() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control.sock");
    let address = socket2::SockAddr::unix(&socket).unwrap();
    let new = || socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    let listener = new();
    listener.bind(&address).unwrap();
    listener.listen(0).unwrap();
    let queued = new();
    queued.connect(&address).unwrap();
    assert_eq!(end(show_status(&socket, false, HASTY, &mut Vec::new())).code, 1);
    let patience = Patience { whole: Some(Duration::from_millis(20)), ..HASTY };
    assert_eq!(
        end(ask_for_receipt(&socket, &upgrade(None), false, false, patience, &mut Vec::new())).code,
        4
    );
}

#[test]
fn no_master_is_exit_code_3() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control.sock");
    let ended = end(show_status(&socket, false, PATIENT, &mut Vec::new()));
    assert_eq!(ended.code, 3);
    assert!(ended.error.contains("No such file") && ended.error.contains("start one"), "{ended:?}");
    drop(UnixListener::bind(&socket).unwrap());
    let ended = end(show_status(&socket, false, PATIENT, &mut Vec::new()));
    assert_eq!(ended.code, 3);
    assert!(ended.error.contains("refused"), "{ended:?}");
}

#[test]
fn a_path_that_no_socket_can_have_is_wrong_usage() {
    let ended = end(show_status(Path::new(&"x".repeat(108)), false, PATIENT, &mut Vec::new()));
    assert_eq!(ended.code, 2, "{ended:?}");
}

#[test]
fn stop_stays_until_the_master_has_ended() {
    let stopped = |replies, then, wait| {
        FakeMaster::says(replies, then).hears(|socket, out| ask_stop(socket, wait, HASTY, out))
    };
    let (request, ended) = stopped("{\"reply\":\"accepted\"}\n", Then::Stay, false);
    assert_eq!(request, Request::Stop { wait: false });
    assert_eq!((ended.code, ended.out.as_str()), (0, "stop accepted\n"));
    for replies in ["{\"reply\":\"accepted\"}\n{\"reply\":\"done\"}\n", "{\"reply\":\"accepted\"}\n"] {
        let (_, ended) = stopped(replies, Then::Close, true);
        assert_eq!((ended.code, ended.out.as_str()), (0, "stopped\n"), "{replies}");
    }
    assert_eq!(stopped("", Then::Close, true).1.code, 1, "gone before it took the wish");
    let (_, ended) = stopped("{\"reply\":\"done\"}\n", Then::Stay, true);
    assert_eq!(ended.code, 1, "done, and still there");
}

#[test]
fn a_full_disk_under_stdout_is_a_failure() {
    let mut full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    assert_eq!(end(print(&mut full, "x")).code, 1);
}

fn sample() -> Status {
    serde_json::from_str(include_str!("sample_status.json")).unwrap()
}

fn now() -> Timestamp {
    "2026-11-22T12:05:00Z".parse().unwrap()
}

const PLAIN: Paint = Paint { coloured: false };

#[test]
fn a_whole_status_reads_well_and_fits_80_columns() {
    let picture = overview::render(&sample(), now(), PLAIN);
    assert_eq!(picture, include_str!("sample_status.txt"));
    let widest = picture.lines().map(|line| line.chars().count()).max();
    assert!(widest <= Some(text::COLUMNS), "{widest:?}");
}

#[test]
fn colour_changes_nothing_but_colour() {
    let coloured = overview::render(&sample(), now(), Paint { coloured: true });
    assert!(coloured.contains("\x1b[32mserving\x1b[0m "), "padding is outside the colour");
    let mut plain = String::new();
    for piece in coloured.split('\x1b') {
        plain += piece.strip_prefix('[').map_or(piece, |rest| rest.split_once('m').unwrap().1);
    }
    assert_eq!(plain, overview::render(&sample(), now(), PLAIN));
}

/// What a terminal shows of a phase.
fn live(phase: Option<Phase>, status: Option<&Status>) -> String {
    let lasts = Duration::from_millis(12_345);
    live::Moment { phase, text: "so \x1b[2Jit is", ready: Some((3, 4)), status, lasts }.line()
}

#[test]
fn each_phase_shows_the_numbers_that_matter_in_it() {
    let mut status = sample();
    let shows = |phase, status: &Status| live(Some(phase), Some(status));
    assert_eq!(live(None, None), "waiting 12.3 s");
    assert_eq!(live(None, Some(&status)), "waiting 12.3 s: the master's state is canary");
    let unknown = live(Some(Phase::Launching), None);
    assert_eq!(unknown, "launching 12.3 s: ███████████████░░░░░ 3 of 4 ready", "as the master told");
    assert_eq!(live(Some(Phase::Draining), None), "draining 12.3 s: so \\u{1b}[2Jit is");
    assert_eq!(shows(Phase::Switch, &status), "switch 12.3 s: so \\u{1b}[2Jit is");
    let canary = shows(Phase::Canary, &status);
    assert_eq!(canary, "canary 12.3 s: 5.5 % of new connections for generation 5");
    let draining = "12.3 s: 1 connection left on generation 3, deadline in 42.5 s";
    assert_eq!(shows(Phase::Draining, &status), format!("draining {draining}"));
    assert_eq!(shows(Phase::Retiring, &status), format!("retiring {draining}"));
    assert_eq!(shows(Phase::Launching, &status), "launching 12.3 s: ██████████░░░░░░░░░░ 1 of 2 ready");
    let [old, active, new] = &mut status.generations[..] else { panic!("{status:#?}") };
    (old.connections, old.deadline_ms) = (None, None);
    active.state = GenerationState::Standby;
    new.workers[1].state = WorkerState::Serving;
    new.state = GenerationState::Launching;
    let all_ready = shows(Phase::Launching, &status);
    assert_eq!(all_ready, "launching 12.3 s: so \\u{1b}[2Jit is", "what it waits for");
    assert_eq!(shows(Phase::Baking, &status), "baking 12.3 s: generation 4 stands by with 12 connections");
    let unsure = shows(Phase::RollingBack, &status);
    assert_eq!(unsure, "rolling_back 12.3 s: ? connections left on generation 3");
    status.generations.clear();
    let gone = shows(Phase::Draining, &status);
    assert_eq!(gone, "draining 12.3 s: so \\u{1b}[2Jit is");
}

#[test]
fn a_master_that_has_only_just_started_is_shown() {
    let empty = r#"{"app":"web","state":"starting","master":{"pid":1,"version":"0.1.0","started_at":"?","reexecs":0,"adopted":false},
        "active_generation":null,"generations":[],"listeners":[],"last_upgrade":null}"#;
    let picture = overview::render(&serde_json::from_str(empty).unwrap(), now(), PLAIN);
    assert_eq!(picture, "web: starting, no generation serves yet\n  master 1, version 0.1.0\n");
}

#[test]
fn odd_values_are_shown_and_harmless() {
    let mut status = sample();
    let generation = &mut status.generations[0];
    (generation.share, generation.connections, generation.executable.sha256) = (0.05, None, None);
    generation.executable.path = format!("/srv/\x1b]0;evil\x07/{}", "long".repeat(40));
    let worker = &mut generation.workers[0];
    worker.status = Some(format!("\x1b[31mred\r\n\u{202e}turned {}", "wide ".repeat(40)));
    worker.started_at = Some("2030-01-01T00:00:00Z".to_owned());
    worker.listeners.clear();
    status.listeners[0].strangers = None;
    let picture = overview::render(&status, now(), PLAIN);
    assert!(picture.chars().all(|c| c == '\n' || !c.is_control() && c != '\u{202e}'), "{picture}");
    for shown in ["5 % of new connections, ? connections open", "\\u{1b}[31mred\\r\\n", "…\n", " 0s  "] {
        assert!(picture.contains(shown), "{shown}: {picture}");
    }
}
