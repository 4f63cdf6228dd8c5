//! The control socket: a unix stream socket, one JSON message per line, both ways.
//!
//! A client sends one [`Request`] and reads [`Reply`] lines until one that [`Reply::is_last`] for it.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::status::{Phase, Receipt, Status};

/// Longest request in bytes, its newline included. The master closes the connection of a longer one.
pub const REQUEST_BYTES_MAX: usize = 64 * 1024;

/// Longest reply in bytes, its newline included: a status of several generations of 1,024 workers fits
/// with room to spare. A client gives up on a longer one.
pub const REPLY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// What a client asks of the master: `{"command":"status"}` and so on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Answered with [`Reply::Status`].
    Status {},
    /// Replace the active generation. Answered by `wait`.
    Upgrade {
        /// How long to stay for the outcome.
        #[serde(default)]
        wait: Wait,
        /// If too many old generations are draining, end the oldest now.
        #[serde(default)]
        force: bool,
    },
    /// Bring the previous generation back: a steer-back while the new one is on trial, else an upgrade to the program and
    /// config of the generation before the active one. Answered by `wait`.
    Rollback {
        /// How long to stay for the outcome.
        #[serde(default)]
        wait: Wait,
    },
    /// Have so many workers from now on, until the next change of the config.
    Scale {
        /// 1 to 1024.
        workers: u32,
        /// Stay until they serve, or are gone ([`Reply::Done`]), else only [`Reply::Accepted`].
        #[serde(default)]
        wait: bool,
    },
    /// Replace the worker of one seat.
    RestartWorker {
        /// Counted from 0.
        seat: u32,
        /// Stay until the next one serves and the old one's listeners are gone, else only [`Reply::Accepted`].
        #[serde(default)]
        wait: bool,
    },
    /// The receipts that are kept. Answered with [`Reply::Receipts`].
    Receipts {},
    /// Replace the master's own program in place. Answered with [`Reply::Done`] or [`Reply::Error`].
    Reexec {},
    /// Stop the whole service.
    Stop {
        /// Stay until everything has stopped ([`Reply::Done`]), else only [`Reply::Accepted`].
        #[serde(default)]
        wait: bool,
    },
}

/// How long the client of an upgrade stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wait {
    /// Not at all: [`Reply::Accepted`] is the only answer.
    #[default]
    None,
    /// Until the old generation has no listener any more: then [`Reply::Receipt`].
    Retired,
    /// Until the old generation has no process any more: then [`Reply::Receipt`].
    Drained,
}

/// What the master answers: `{"reply":"done"}` and so on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// The whole status.
    Status {
        /// See [`Status`].
        status: Box<Status>,
    },
    /// What a waiting client shows meanwhile; more replies follow.
    Progress {
        /// The phase the upgrade is in.
        state: Phase,
        /// The same in words, for people: `3 of 4 ready`.
        text: String,
        /// Workers that have got there; null where the phase does not count workers.
        ready: Option<u32>,
        /// Workers that have to get there; null where the phase does not count workers.
        of: Option<u32>,
    },
    /// The wish is taken; the last answer unless the client waits. It comes at once, also to who waits: a client
    /// takes silence for a master that hangs.
    Accepted,
    /// How the upgrade ended.
    Receipt {
        /// See [`Receipt`].
        receipt: Box<Receipt>,
        /// The exit code of the client: 0 when what it asked for is so, else 1.
        #[serde(default)]
        code: u8,
    },
    /// The receipts of the last upgrades.
    Receipts {
        /// Oldest first, at most 50.
        receipts: Vec<Receipt>,
    },
    /// What was asked for is done.
    Done,
    /// What was asked for is not done, and why.
    Error {
        /// Object, action, cause and remedy, for people.
        message: String,
        /// The exit code of the client: 2 when the config is invalid, else 1.
        #[serde(default = "failed")]
        code: u8,
        /// Of an upgrade that was refused before it began.
        #[serde(default)]
        receipt: Option<Box<Receipt>>,
    },
}

const fn failed() -> u8 {
    1
}

impl Reply {
    /// Whether no further reply follows. [`Reply::Accepted`] is the last one only for who does not wait.
    #[must_use]
    pub fn is_last(&self, waiting: bool) -> bool {
        match self {
            Self::Progress { .. } => false,
            Self::Accepted => !waiting,
            Self::Status { .. }
            | Self::Receipt { .. }
            | Self::Receipts { .. }
            | Self::Done
            | Self::Error { .. } => true,
        }
    }
}

/// Why a line is no message.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Longer than the limit of its direction.
    #[error("control message has {bytes} bytes, more than the {bytes_max} allowed")]
    TooLong {
        /// Length in bytes.
        bytes: usize,
        /// What is allowed.
        bytes_max: usize,
    },
    /// No JSON, or not the JSON of a message.
    #[error("control message is not understood ({0}): client and master may be of different versions")]
    Json(#[from] serde_json::Error),
}

/// The line, with its newline, that carries a request or a reply.
///
/// # Errors
/// None for the types of this module: they hold no map with keys that are not text.
pub fn encode<T: Serialize>(message: &T) -> Result<String, ControlError> {
    let mut line = serde_json::to_string(message)?;
    line.push('\n');
    Ok(line)
}

/// The request in a line, with or without its newline.
///
/// # Errors
/// Longer than [`REQUEST_BYTES_MAX`], no JSON, unknown command, unknown or missing field.
pub fn decode_request(line: &[u8]) -> Result<Request, ControlError> {
    decode(line, REQUEST_BYTES_MAX)
}

/// The reply in a line, with or without its newline.
///
/// # Errors
/// Longer than [`REPLY_BYTES_MAX`], no JSON, unknown reply, missing field. Unknown fields are ignored.
pub fn decode_reply(line: &[u8]) -> Result<Reply, ControlError> {
    decode(line, REPLY_BYTES_MAX)
}

fn decode<T: DeserializeOwned>(line: &[u8], bytes_max: usize) -> Result<T, ControlError> {
    if line.len() > bytes_max {
        return Err(ControlError::TooLong { bytes: line.len(), bytes_max });
    }
    Ok(serde_json::from_slice(line)?)
}
