//! The subcommands that speak to a running master: `status`, `upgrade`, `stop`, `reexec`.
//!
//! Exit codes: 0 done; 1 failed, rolled back, refused or not allowed; 2 invalid config; 3 no master reachable;
//! 4 `--timeout` passed.

mod connection;
mod error;
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
use reuseportd_wire::status::{Outcome, Receipt, Status};

use self::connection::{Connection, Patience};
use self::error::ClientError;
use self::progress::Progress;
use self::text::Paint;
use crate::cli::{Master, WaitFor};

/// `status [--json]`.
pub(crate) fn status(master: &Master, json: bool) -> ExitCode {
    run(master, |socket| show_status(socket, json, Patience::new(None), &mut stdout()))
}

/// `upgrade [--wait[=FOR]] [--force] [--json] [--timeout D]`.
pub(crate) fn upgrade(
    master: &Master,
    wait: Option<WaitFor>,
    force: bool,
    json: bool,
    timeout: Option<Duration>,
) -> ExitCode {
    run(master, |socket| ask_upgrade(socket, wait, force, json, Patience::new(timeout), &mut stdout()))
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
    let text = error.to_string();
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

fn ask_upgrade(
    socket: &Path,
    wait: Option<WaitFor>,
    force: bool,
    json: bool,
    patience: Patience,
    out: &mut impl Write,
) -> Result<(), ClientError> {
    let wait = match wait {
        None => Wait::None,
        Some(WaitFor::Retired) => Wait::Retired,
        Some(WaitFor::Drained) => Wait::Drained,
    };
    let mut connection = Connection::open(socket, &Request::Upgrade { wait, force }, patience)?;
    let receipt = match await_receipt(&mut connection, wait) {
        Err(ClientError::Refused { message, code, receipt: Some(receipt) }) if json => {
            print(out, &as_json(&receipt)?)?;
            return Err(ClientError::Refused { message, code, receipt: None });
        }
        result => result?,
    };
    let Some(receipt) = receipt else {
        return if json { Ok(()) } else { print(out, "upgrade accepted\n") };
    };
    print(out, &if json { as_json(&receipt)? } else { receipt::render(&receipt, paint()) })?;
    match receipt.outcome {
        Outcome::Completed => Ok(()),
        outcome @ (Outcome::RolledBack | Outcome::Refused | Outcome::Superseded) => {
            Err(ClientError::NotCompleted { outcome, reason: receipt::reason(&receipt).to_owned() })
        }
    }
}

/// The receipt, or none when the upgrade was accepted and nobody waits for more.
fn await_receipt(connection: &mut Connection, wait: Wait) -> Result<Option<Receipt>, ClientError> {
    let mut progress = Progress::new();
    let mut accepted = false;
    loop {
        let reply = match connection.reply() {
            Err(ClientError::Closed { path }) if accepted => Err(ClientError::MasterEnded { path }),
            reply => reply,
        };
        match reply? {
            Reply::Progress { state, text, .. } => progress.show(state, &text),
            Reply::Accepted if wait == Wait::None => return Ok(None),
            Reply::Accepted => accepted = true,
            Reply::Receipt { receipt } => return Ok(Some(*receipt)),
            Reply::Status { .. } | Reply::Done | Reply::Error { .. } => return Err(connection.unexpected()),
        }
    }
}

fn ask_reexec(socket: &Path, patience: Patience, out: &mut impl Write) -> Result<(), ClientError> {
    let mut connection = Connection::open(socket, &Request::Reexec {}, patience)?;
    loop {
        match connection.reply()? {
            Reply::Accepted | Reply::Progress { .. } => {}
            Reply::Done => return print(out, "re-executed\n"),
            Reply::Status { .. } | Reply::Receipt { .. } | Reply::Error { .. } => {
                return Err(connection.unexpected());
            }
        }
    }
}

fn ask_stop(socket: &Path, wait: bool, patience: Patience, out: &mut impl Write) -> Result<(), ClientError> {
    let mut connection = Connection::open(socket, &Request::Stop { wait }, patience)?;
    let mut progress = Progress::new();
    let mut accepted = false;
    loop {
        match connection.reply() {
            Ok(Reply::Progress { state, text, .. }) => progress.show(state, &text),
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
    encode(value).map_err(|error| ClientError::Output(std::io::Error::other(error)))
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
