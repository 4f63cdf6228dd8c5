//! The handover channel: one inherited `SOCK_SEQPACKET` socket per worker, one text datagram per message.
//!
//! A message is UTF-8, at most [`DATAGRAM_BYTES_MAX`] bytes, words separated by one space, the first
//! word being the verb. Receivers ignore words after those they know, so that a verb can grow; a verb
//! they do not know they answer with `unknown VERB`, and go on. Nothing on this channel is ever fatal:
//! when the peer's end closes, a worker goes on serving.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::str::Split;

use crate::is_name;

/// Longest message in bytes; a receive buffer of one byte more tells a longer one.
pub const DATAGRAM_BYTES_MAX: usize = 4096;

/// Most listeners one `ready` can carry: so many of the longest names fit into one datagram, and so
/// many descriptors into one `SCM_RIGHTS` (the kernel's limit there is 253).
pub const LISTENERS_MAX: usize = 60;

/// What a worker says to the master.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromWorker {
    /// `ready NAME...`: it has initialised. `SCM_RIGHTS` carries one bound, not yet listening socket per
    /// name, in this order. One of UDP never listens, and may have been given datagrams already.
    Ready(Vec<String>),
    /// `drained`: after `stop`, every listener was accepted empty, every UDP socket received empty, and all closed.
    Drained,
    /// `taken NAME COUNT`: the leftovers of a dead sibling's listener are accepted, its descriptor is closed.
    Taken {
        /// The listener's name.
        name: String,
        /// Connections accepted from it.
        count: u32,
    },
    /// `error TEXT...`: why the worker can't go on, for the reason the master gives its operator.
    Error(String),
    /// `unknown VERB`: the master sent a verb this worker does not know.
    Unknown(String),
}

/// What the master says to a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToWorker {
    /// `serve`: the master has called `listen()` on the worker's sockets; accept.
    Serve,
    /// `stop`: accept until EAGAIN on every listener, receive until EAGAIN from every UDP socket, close them, say
    /// `drained`, finish open connections, exit.
    Stop,
    /// `take NAME`: one descriptor is attached, the listener of a dead sibling. Accept from it until
    /// EAGAIN, close it, answer `taken NAME COUNT`, serve what was accepted.
    Take(String),
    /// `unknown VERB`: the worker sent a verb this master does not know.
    Unknown(String),
}

/// Why a datagram is no message, or a message no datagram.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError {
    /// The verb is well-formed but not known here: answer it with `unknown VERB`.
    #[error("channel message has the unknown verb '{0}': answer it and go on")]
    UnknownVerb(String),
    /// More than [`DATAGRAM_BYTES_MAX`] bytes.
    #[error("channel message has {bytes} bytes, more than the {DATAGRAM_BYTES_MAX} allowed: shorten it")]
    TooLong {
        /// Length in bytes.
        bytes: usize,
    },
    /// Not UTF-8, or the first word is no verb.
    #[error(
        "channel message is not text of the form 'VERB WORD...': send UTF-8 words with one space between"
    )]
    NotText,
    /// A known verb with too few words or a word of the wrong form.
    #[error("channel message '{verb}' has the wrong words: its form is '{form}'")]
    Malformed {
        /// The verb.
        verb: &'static str,
        /// What the message should look like.
        form: &'static str,
    },
}

impl FromWorker {
    /// The datagram for this message. The text of `error` is made one line and cut to fit.
    ///
    /// # Errors
    /// A word that its form does not allow, or a message that is too long.
    pub fn encode(&self) -> Result<String, ChannelError> {
        let datagram = match self {
            Self::Ready(names) => format!("ready {}", names.join(" ")),
            Self::Drained => "drained".to_owned(),
            Self::Taken { name, count } => format!("taken {name} {count}"),
            Self::Error(text) => {
                let mut line = format!("error {}", one_line(text));
                line.truncate(line.floor_char_boundary(DATAGRAM_BYTES_MAX));
                line
            }
            Self::Unknown(verb) => format!("unknown {verb}"),
        };
        Self::decode(datagram.as_bytes()).map(|_| datagram)
    }

    /// The message in a datagram.
    ///
    /// # Errors
    /// See [`ChannelError`]; none of them is a reason to close the channel.
    pub fn decode(datagram: &[u8]) -> Result<Self, ChannelError> {
        let (verb, mut words) = split(datagram)?;
        match verb {
            "ready" => {
                let names: Vec<String> = words.map(ToOwned::to_owned).collect();
                let fits =
                    (1..=LISTENERS_MAX).contains(&names.len()) && names.iter().all(|name| is_name(name));
                fits.then_some(Self::Ready(names)).ok_or(malformed("ready", "ready NAME..."))
            }
            "drained" => Ok(Self::Drained),
            "taken" => {
                let (name, count) = (name(&mut words), words.next().and_then(|word| word.parse().ok()));
                let (Some(name), Some(count)) = (name, count) else {
                    return Err(malformed("taken", "taken NAME COUNT"));
                };
                Ok(Self::Taken { name, count })
            }
            "error" => Ok(Self::Error(one_line(&words.collect::<Vec<_>>().join(" ")))),
            "unknown" => Ok(Self::Unknown(name(&mut words).ok_or(UNKNOWN_MALFORMED)?)),
            other => Err(ChannelError::UnknownVerb(other.to_owned())),
        }
    }
}

impl ToWorker {
    /// The datagram for this message.
    ///
    /// # Errors
    /// A name that [`is_name`] refuses.
    pub fn encode(&self) -> Result<String, ChannelError> {
        let datagram = match self {
            Self::Serve => "serve".to_owned(),
            Self::Stop => "stop".to_owned(),
            Self::Take(name) => format!("take {name}"),
            Self::Unknown(verb) => format!("unknown {verb}"),
        };
        Self::decode(datagram.as_bytes()).map(|_| datagram)
    }

    /// The message in a datagram.
    ///
    /// # Errors
    /// See [`ChannelError`]; none of them is a reason to close the channel.
    pub fn decode(datagram: &[u8]) -> Result<Self, ChannelError> {
        let (verb, mut words) = split(datagram)?;
        match verb {
            "serve" => Ok(Self::Serve),
            "stop" => Ok(Self::Stop),
            "take" => Ok(Self::Take(name(&mut words).ok_or(malformed("take", "take NAME"))?)),
            "unknown" => Ok(Self::Unknown(name(&mut words).ok_or(UNKNOWN_MALFORMED)?)),
            other => Err(ChannelError::UnknownVerb(other.to_owned())),
        }
    }
}

const UNKNOWN_MALFORMED: ChannelError = malformed("unknown", "unknown VERB");

const fn malformed(verb: &'static str, form: &'static str) -> ChannelError {
    ChannelError::Malformed { verb, form }
}

/// The verb and the words after it. A verb has the form of a name, so it can be echoed and logged.
fn split(datagram: &[u8]) -> Result<(&str, Split<'_, char>), ChannelError> {
    if datagram.len() > DATAGRAM_BYTES_MAX {
        return Err(ChannelError::TooLong { bytes: datagram.len() });
    }
    let mut words = core::str::from_utf8(datagram).map_err(|_| ChannelError::NotText)?.split(' ');
    let verb = words.next().filter(|verb| is_name(verb)).ok_or(ChannelError::NotText)?;
    Ok((verb, words))
}

fn name(words: &mut Split<'_, char>) -> Option<String> {
    words.next().filter(|word| is_name(word)).map(ToOwned::to_owned)
}

/// Control characters become spaces: the text ends up in logs and on terminals.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
