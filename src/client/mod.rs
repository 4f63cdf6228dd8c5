//! The subcommands that speak to a running master: `status`, `upgrade`, `rollback`, `scale`, `restart-worker`, `stop`,
//! `reexec`.
//!
//! Exit codes: 0 done; 1 failed, rolled back, refused or not allowed; 2 invalid config; 3 no master reachable;
//! 4 `--timeout` passed.

mod connection;
mod error;
mod live;
mod look;
mod overview;
mod progress;
mod receipt;
#[cfg(test)]
mod tests;
pub(crate) mod text;

use std::io::{ErrorKind, IsTerminal, Write, stderr, stdout};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use jiff::Timestamp;
use reuseportd_wire::control::{Reply, Request, Wait, encode};
use reuseportd_wire::status::{Outcome, Status};

use self::connection::{Connection, Patience};
use self::error::ClientError;
use self::progress::Progress;
use self::text::{Paint, escape_json, escape_lines};
use crate::cli::{Master, Stay, WaitFor};

/// `status [--json]`.
pub(crate) fn status(master: &Master, json: bool) -> ExitCode {
    run(master, |socket| show_status(socket, json, Patience::new(None), &mut stdout()))
}

/// `status --receipts [--json]`.
pub(crate) fn receipts(master: &Master, json: bool) -> ExitCode {
    run(master, |socket| show_receipts(socket, json, Patience::new(None), &mut stdout()))
}

/// `upgrade [--wait[=FOR]] [--force] [--json] [--timeout D]`.
pub(crate) fn upgrade(master: &Master, force: bool, stay: &Stay) -> ExitCode {
    stay_for_receipt(master, &Request::Upgrade { wait: wait_for(stay.wait), force }, stay)
}

/// `rollback [--wait[=FOR]] [--json] [--timeout D]`.
pub(crate) fn rollback(master: &Master, stay: &Stay) -> ExitCode {
    stay_for_receipt(master, &Request::Rollback { wait: wait_for(stay.wait) }, stay)
}

fn stay_for_receipt(master: &Master, request: &Request, stay: &Stay) -> ExitCode {
    let (waits, patience) = (stay.wait.is_some(), Patience::new(stay.timeout));
    run(master, |socket| ask_for_receipt(socket, request, waits, stay.json, patience, &mut stdout()))
}

/// `scale N [--wait] [--timeout D]`.
pub(crate) fn scale(master: &Master, workers: u32, wait: bool, timeout: Option<Duration>) -> ExitCode {
    run(master, |socket| ask_scale(socket, workers, wait, Patience::new(timeout), &mut stdout()))
}

/// `restart-worker SEAT [--wait] [--timeout D]`.
pub(crate) fn restart_worker(master: &Master, seat: u32, wait: bool, timeout: Option<Duration>) -> ExitCode {
    run(master, |socket| ask_restart_worker(socket, seat, wait, Patience::new(timeout), &mut stdout()))
}

/// `stop [--wait]`.
pub(crate) fn stop(master: &Master, wait: bool) -> ExitCode {
    run(master, |socket| ask_stop(socket, wait, Patience::new(None), &mut stdout()))
}

/// `stop --left-behind`.
pub(crate) fn stop_left_behind(master: &Master) -> ExitCode {
    run(master, |socket| {
        let ended = crate::master::end_left_behind(socket).map_err(ClientError::LeftBehind)?;
        print(&mut stdout(), &format!("{ended} workers were left behind\n"))
    })
}

/// `reexec`.
pub(crate) fn reexec(master: &Master) -> ExitCode {
    run(master, |socket| ask_reexec(socket, Patience::new(None), &mut stdout()))
}

fn run(master: &Master, ask: impl FnOnce(&Path) -> Result<(), ClientError>) -> ExitCode {
    let done = master.socket().map_err(ClientError::from).and_then(|socket| ask(&socket));
    let Err(error) = done else { return ExitCode::SUCCESS };
    // Without a stderr the exit code still tells.
    let text = match &error {
        // In colours of its own, perhaps.
        ClientError::Config(errors) => errors.to_string(),
        error => escape_lines(&error.to_string()),
    };
    // What is wrong with a config brings its own heading, from here and from the master.
    let heading = if text.starts_with("error:") { "" } else { "error: " };
    let _ = writeln!(stderr(), "{heading}{text}");
    ExitCode::from(error.exit_code())
}

fn show_status(
    socket: &Path,
    json: bool,
    patience: Patience,
    out: &mut impl Write,
) -> Result<(), ClientError> {
    let status = fetch_status(socket, patience)?;
    let text = match json {
        true => as_json(&status)?,
        false => overview::render(&status, Timestamp::now(), paint()),
    };
    print(out, &text)
}

fn fetch_status(socket: &Path, patience: Patience) -> Result<Status, ClientError> {
    let mut connection = Connection::open(socket, &Request::Status {}, patience)?;
    let Reply::Status { status } = connection.reply()? else { return Err(connection.unexpected()) };
    Ok(*status)
}

/// The status of the master at this socket, for subcommands that look further than it can.
///
/// # Errors
/// The exit code `status` would end with, and its words.
pub(crate) fn status_at(socket: &Path) -> Result<Status, (u8, String)> {
    fetch_status(socket, Patience::new(None)).map_err(|error| (error.exit_code(), error.to_string()))
}

fn show_receipts(
    socket: &Path,
    json: bool,
    patience: Patience,
    out: &mut impl Write,
) -> Result<(), ClientError> {
    let mut connection = Connection::open(socket, &Request::Receipts {}, patience)?;
    let Reply::Receipts { receipts } = connection.reply()? else { return Err(connection.unexpected()) };
    print(out, &if json { as_json(&receipts)? } else { receipt::render_all(&receipts, paint()) })
}

fn wait_for(wait: Option<WaitFor>) -> Wait {
    match wait {
        None => Wait::None,
        Some(WaitFor::Retired) => Wait::Retired,
        Some(WaitFor::Drained) => Wait::Drained,
    }
}

/// An upgrade or a rollback.
fn ask_for_receipt(
    socket: &Path,
    request: &Request,
    waits: bool,
    json: bool,
    patience: Patience,
    out: &mut impl Write,
) -> Result<(), ClientError> {
    let is_upgrade = matches!(request, Request::Upgrade { .. });
    let (receipt, code) = match ask(socket, request, waits, patience) {
        Ok(Reply::Accepted) if json => return Ok(()),
        Ok(Reply::Accepted) if is_upgrade => return print(out, "upgrade accepted\n"),
        Ok(Reply::Accepted) => return print(out, "rollback accepted\n"),
        Ok(Reply::Receipt { receipt, code }) => (receipt, code),
        Ok(_) => return Err(ClientError::Unexpected { path: socket.to_owned() }),
        Err(ClientError::Refused { message, code, receipt: Some(receipt) }) if json => {
            print(out, &as_json(&receipt)?)?;
            return Err(ClientError::Refused { message, code, receipt: None });
        }
        Err(error) => return Err(error),
    };
    // An older master sends no code, but knows no rollback either: there an upgrade that was rolled back is a success.
    let is_failed = code != 0 || is_upgrade && receipt.outcome != Outcome::Completed;
    let text = match json {
        true => as_json(&receipt)?,
        // The error says why.
        false if is_failed => receipt::render(&receipt, paint()),
        false => receipt::render_with_reason(&receipt, paint()),
    };
    print(out, &text)?;
    match is_failed {
        true => Err(ClientError::NotCompleted { receipt, code }),
        false => Ok(()),
    }
}

/// The last reply to a request; what comes before it is shown as progress.
fn ask(socket: &Path, request: &Request, waits: bool, patience: Patience) -> Result<Reply, ClientError> {
    let mut connection = Connection::open(socket, request, patience)?;
    let mut progress = Progress::new(socket);
    let mut is_accepted = false;
    loop {
        match progress.reply(&mut connection) {
            Ok(reply) if reply.is_last(waits) => return Ok(reply),
            Ok(_) => is_accepted = true,
            Err(ClientError::Closed { path }) if is_accepted => {
                return Err(ClientError::MasterEnded { path });
            }
            Err(error) => return Err(error),
        }
    }
}

/// A request of which there is nothing more to say than one of these two words.
fn ask_for_done(
    socket: &Path,
    request: &Request,
    waits: bool,
    patience: Patience,
    out: &mut impl Write,
    [accepted, done]: [&str; 2],
) -> Result<(), ClientError> {
    match ask(socket, request, waits, patience)? {
        Reply::Accepted => print(out, accepted),
        Reply::Done => print(out, done),
        _ => Err(ClientError::Unexpected { path: socket.to_owned() }),
    }
}

fn ask_scale(
    socket: &Path,
    workers: u32,
    wait: bool,
    patience: Patience,
    out: &mut impl Write,
) -> Result<(), ClientError> {
    let done = format!("scaled to {workers}\n");
    ask_for_done(socket, &Request::Scale { workers, wait }, wait, patience, out, ["scale accepted\n", &done])
}

fn ask_restart_worker(
    socket: &Path,
    seat: u32,
    wait: bool,
    patience: Patience,
    out: &mut impl Write,
) -> Result<(), ClientError> {
    let done = format!("worker of seat {seat} restarted\n");
    let words = ["restart accepted\n", &done];
    ask_for_done(socket, &Request::RestartWorker { seat, wait }, wait, patience, out, words)
}

fn ask_reexec(socket: &Path, patience: Patience, out: &mut impl Write) -> Result<(), ClientError> {
    ask_for_done(socket, &Request::Reexec {}, true, patience, out, ["", "re-executed\n"])
}

fn ask_stop(socket: &Path, wait: bool, patience: Patience, out: &mut impl Write) -> Result<(), ClientError> {
    let mut connection = Connection::open(socket, &Request::Stop { wait }, patience)?;
    let mut progress = Progress::new(socket);
    let mut accepted = false;
    loop {
        match progress.reply(&mut connection) {
            Ok(Reply::Accepted) if wait => accepted = true,
            Ok(Reply::Accepted) => return print(out, "stop accepted\n"),
            // A master that is started next finds the socket and the lock free only when this one has ended.
            Ok(Reply::Done) => {
                connection.until_closed()?;
                break;
            }
            Ok(_) => return Err(connection.unexpected()),
            Err(ClientError::Closed { .. }) if accepted => break,
            Err(error) => return Err(error),
        }
    }
    drop(progress);
    print(out, "stopped\n")
}

fn as_json<T: serde::Serialize>(value: &T) -> Result<String, ClientError> {
    let text = encode(value).map_err(|error| ClientError::Output(std::io::Error::other(error)))?;
    Ok(escape_json(&text))
}

/// Colour where a person looks and has not asked for none (no-color.org).
pub(crate) fn paint() -> Paint {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    Paint { coloured: stdout().is_terminal() && !unwanted }
}

fn print(out: &mut impl Write, text: &str) -> Result<(), ClientError> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // A reader that has seen enough (`| head -1`) is no failure.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(ClientError::Output),
    }
}
