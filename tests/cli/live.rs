//! What a terminal shows while an upgrade is waited for: the real program on a pseudo-terminal, against a master that is
//! a thread with a script.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

use reuseportd_wire::control::{Reply, Request, decode_request, encode};
use reuseportd_wire::status::{
    GenerationState, Outcome, Phase, Receipt, Status, Trigger, WorkerState, WorkerStatus,
};

use crate::support::PATIENCE;
use crate::support::master::REUSEPORTD;
use crate::support::process::{Done, Running};
use crate::support::world::{Need, world};

/// util-linux's, which runs a command on a pseudo-terminal.
const TERMINAL: Need = Need::Runs("script", &["--version"]);

/// Of each phase so many statuses are asked for: what the first told was drawn before the third is asked for.
const LOOKS: usize = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Looks {
    Answered,
    /// Answered by half a line.
    Stuck,
    /// There must be none.
    Unwanted,
}

fn sample() -> Status {
    serde_json::from_str(include_str!("../../src/client/sample_status.json")).unwrap()
}

/// The status in a phase of the upgrade from generation 4 to 5.
fn status(phase: Phase) -> Status {
    let mut status = sample();
    let [oldest, old, new] = &mut status.generations[..] else { panic!("{status:#?}") };
    oldest.state = GenerationState::Draining;
    match phase {
        Phase::Launching => {
            (new.state, new.share) = (GenerationState::Launching, 0.0);
            let worker = |seat, state| WorkerStatus { seat, state, ..new.workers[0].clone() };
            new.workers = (0..3).map(|seat| worker(seat, WorkerState::Ready)).collect();
            new.workers.push(WorkerStatus {
                seat: 3,
                state: WorkerState::Starting,
                ..new.workers[0].clone()
            });
        }
        Phase::Baking => (old.state, old.connections) = (GenerationState::Standby, Some(23)),
        Phase::Draining => {
            old.state = GenerationState::Draining;
            (old.connections, old.deadline_ms) = (Some(17), Some(42_500));
        }
        _ => {}
    }
    status
}

fn receipt() -> Receipt {
    let receipt = sample().last_upgrade.unwrap();
    let (trigger, outcome) = (Trigger::Command, Outcome::Completed);
    Receipt { from: Some(4), to: Some(5), trigger, outcome, reason: None, ..receipt }
}

fn tell(mut stream: &UnixStream, reply: &Reply) {
    stream.write_all(encode(reply).unwrap().as_bytes()).unwrap();
}

/// Takes one upgrade through its phases; when the receipt was sent.
fn play(socket: &Path, looks: Looks) -> JoinHandle<Instant> {
    let listener = UnixListener::bind(socket).unwrap();
    let next = move |listener: &UnixListener| {
        let (stream, _) = listener.accept().unwrap();
        let mut line = Vec::new();
        BufReader::new(&stream).read_until(b'\n', &mut line).unwrap();
        (stream, decode_request(&line).unwrap())
    };
    spawn(move || {
        let (upgrade, request) = next(&listener);
        assert!(matches!(request, Request::Upgrade { .. }), "{request:?}");
        tell(&upgrade, &Reply::Accepted);
        for state in [Phase::Launching, Phase::Canary, Phase::Baking, Phase::Draining] {
            let text = format!(
                "the master's words for {state}, which are long and have to be cut where it is narrow"
            );
            let (ready, of) = (state == Phase::Launching).then_some((1, 4)).unzip();
            tell(&upgrade, &Reply::Progress { state, text, ready, of });
            if looks == Looks::Answered {
                for _ in 0..LOOKS {
                    let (look, request) = next(&listener);
                    assert_eq!(request, Request::Status {});
                    tell(&look, &Reply::Status { status: Box::new(status(state)) });
                }
            }
        }
        if looks == Looks::Stuck {
            let (mut look, _) = next(&listener);
            look.write_all(b"{\"reply\":\"status\",").unwrap();
            look.set_read_timeout(Some(PATIENCE)).unwrap();
            assert_eq!(look.read(&mut [0]).unwrap(), 0, "given up");
        }
        let sent = Instant::now();
        tell(&upgrade, &Reply::Receipt { receipt: Box::new(receipt()), code: 0 });
        if looks == Looks::Unwanted {
            // The client closes its connection at its end: nobody can knock after that.
            assert_eq!(BufReader::new(&upgrade).read_until(b'\n', &mut Vec::new()).unwrap(), 0);
            listener.set_nonblocking(true).unwrap();
            assert_eq!(
                listener.accept().unwrap_err().kind(),
                ErrorKind::WouldBlock,
                "a status was asked for"
            );
        }
        sent
    })
}

/// `upgrade` on a terminal so many columns wide; stdout and stderr are one.
fn on_terminal(socket: &Path, columns: usize) -> Done {
    let line = format!(
        "stty cols {columns} rows 24; exec {REUSEPORTD} upgrade --wait=drained --socket {}",
        socket.display()
    );
    let mut command = Command::new("script");
    command.args(["--quiet", "--return", "--command", &line, "/dev/null"]).stdin(Stdio::null());
    command.env("TERM", "xterm").env("NO_COLOR", "1");
    Running::start(command).finish(PATIENCE)
}

/// The lines as they are drawn over each other, without what moves the cursor. A terminal breaks those that are too long.
fn drawn(screen: &str, columns: usize) -> Vec<String> {
    let mut text = String::new();
    for piece in screen.replace('\r', "\n").split('\x1b') {
        let command = |rest: &str| {
            let (arguments, rest) = rest.split_at(rest.find(char::is_alphabetic).unwrap());
            assert!(arguments.chars().all(|c| c.is_ascii_digit() || c == ';'), "{piece:?}");
            assert!(!rest.starts_with('m'), "colour, where none is wanted: {piece:?}");
            format!("\n{}", &rest[1..])
        };
        text += &piece.strip_prefix('[').map_or(piece.to_owned(), command);
    }
    let broken = |line: &str| -> Vec<String> {
        let line: Vec<char> = line.chars().collect();
        line.chunks(columns).map(|part| part.iter().collect::<String>().trim_end().to_owned()).collect()
    };
    text.lines().flat_map(broken).filter(|line| !line.is_empty()).collect()
}

const PHASES: [(&str, &str); 4] = [
    ("launching", "s: ███████████████░░░░░ 3 of 4 ready"),
    ("canary", "s: 5.5 % of new connections for generation 5"),
    ("baking", "s: generation 4 stands by with 23 connections"),
    ("draining", "s: 17 connections left on generation 4, deadline in 42.5 s"),
];

#[test]
fn a_terminal_shows_the_numbers_of_each_phase() {
    world(&[TERMINAL], |world| {
        for columns in [80, 34] {
            let socket = world.path(&format!("{columns}.sock"));
            let master = play(&socket, Looks::Answered);
            let done = on_terminal(&socket, columns);
            master.join().unwrap();
            assert_eq!(done.code, 0, "{done:#?}");
            let lines = drawn(&done.stdout, columns);
            let receipt = lines.iter().position(|line| line.starts_with("upgrade from generation 4 to 5"));
            let live = &lines[..receipt.unwrap_or_else(|| panic!("no receipt: {lines:#?}"))];
            for line in live {
                let is_whole = PHASES.iter().any(|(phase, _)| line.starts_with(phase));
                assert!(is_whole, "longer than {columns} columns before {line:?}: {live:#?}");
            }
            assert!(live[0].contains("s: █████░░"), "what the master told itself: {live:#?}");
            let mut from = 0;
            for (phase, shown) in PHASES {
                let part: String = shown.chars().take(columns - "launching 0.0 ".len()).collect();
                let shows =
                    |line: &String| line.starts_with(&format!("{phase} ")) && line.contains(part.trim_end());
                let at = live[from..].iter().position(shows);
                from += at.unwrap_or_else(|| panic!("{part:?} of {phase} is not shown: {live:#?}"));
                let took = |line: &String| line.starts_with(&format!("{phase}: "));
                let at = live[from..].iter().position(took);
                from += at.unwrap_or_else(|| panic!("how long {phase} took is not shown: {live:#?}"));
            }
        }
    });
}

#[test]
fn a_status_that_does_not_come_holds_up_nothing() {
    world(&[TERMINAL], |world| {
        let socket = world.path("control.sock");
        let master = play(&socket, Looks::Stuck);
        let done = on_terminal(&socket, 80);
        let took = master.join().unwrap().elapsed();
        assert_eq!(done.code, 0, "{done:#?}");
        assert!(done.stdout.contains("the master's words for draining"), "{done:#?}");
        assert!(took < Duration::from_secs(1), "{took:?} from the receipt to the end of the client");
    });
}

#[test]
fn without_a_terminal_there_is_a_line_for_each_phase_and_no_status_is_asked_for() {
    world(&[], |world| {
        let socket = world.path("control.sock");
        let master = play(&socket, Looks::Unwanted);
        let mut command = Command::new(REUSEPORTD);
        command.args(["upgrade", "--wait=drained", "--json", "--socket"]).arg(&socket);
        let done = Running::start(command).finish(PATIENCE);
        master.join().unwrap();
        assert_eq!(done.code, 0, "{done:#?}");
        let told: Receipt = serde_json::from_str(&done.stdout).unwrap();
        assert_eq!(told, receipt());
        let phases: Vec<_> = done.stderr.lines().map(|line| line.split_once(": ").unwrap().0).collect();
        assert_eq!(phases, ["launching", "canary", "baking", "draining"]);
    });
}
