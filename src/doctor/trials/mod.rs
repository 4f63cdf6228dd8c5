//! Experiments on scratch sockets: what the kernel does is worth more than what its version promises.

mod cbpf;
mod ebpf;
mod migrate;
mod order;
mod scratch;

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use reuseportd_sys::pidfd;

use self::migrate::Fate;

/// How an experiment ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Trial {
    /// As it must be.
    Passed,
    /// The kernel does something else.
    Failed(String),
    /// It could not be made.
    Untested(Obstacle),
}

/// What kept an experiment from being made, and what removes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Obstacle {
    pub(super) why: String,
    pub(super) remedy: &'static str,
}

/// Why an experiment did not pass.
#[derive(Debug)]
enum Trouble {
    Failed(String),
    Untested(Obstacle),
}

impl Trouble {
    fn untested(why: impl Into<String>, remedy: &'static str) -> Trouble {
        Trouble::Untested(Obstacle { why: why.into(), remedy })
    }
}

impl From<std::io::Error> for Trouble {
    /// Without sockets that can be connected nothing is known.
    fn from(error: std::io::Error) -> Self {
        let (what, remedy) = match error.kind() {
            ErrorKind::NetworkUnreachable
            | ErrorKind::HostUnreachable
            | ErrorKind::AddrNotAvailable
            | ErrorKind::TimedOut => {
                ("loopback is not usable here: ", "ip link set lo up   # and: reuseportd doctor")
            }
            _ if is_out_of_descriptors(&error) => ("", "ulimit -n 1024   # and: reuseportd doctor"),
            _ => ("", AGAIN),
        };
        Trouble::untested(format!("{what}{error}"), remedy)
    }
}

const AGAIN: &str = "reuseportd doctor   # again";

/// For who has CAP_BPF and is refused all the same.
pub(super) const ALLOW_BPF: &str = "allow bpf(2): kernel 5.14 or later, CONFIG_BPF_SYSCALL, the seccomp profile of the \
                                    container or SystemCallFilter= of the unit, and kernel lockdown";

fn is_out_of_descriptors(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::MFILE, Errno::NFILE].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

impl From<Trouble> for Obstacle {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Failed(why) => Obstacle { why, remedy: AGAIN },
            Trouble::Untested(obstacle) => obstacle,
        }
    }
}

impl From<Result<(), Trouble>> for Trial {
    fn from(result: Result<(), Trouble>) -> Self {
        match result {
            Ok(()) => Trial::Passed,
            Err(Trouble::Failed(why)) => Trial::Failed(why),
            Err(Trouble::Untested(why)) => Trial::Untested(why),
        }
    }
}

/// What becomes of a queued connection, without any program, when its listener closes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Orphan {
    /// It moved to the other listener of the group.
    Moved,
    /// It was reset.
    Reset,
    /// It could not be tried.
    Untested(Obstacle),
}

/// All of them.
#[derive(Debug, Clone)]
pub(super) struct Trials {
    /// The program chooses only the admitted listener, before and after a switch.
    pub(super) steering: Trial,
    /// A closing listener's queue goes where the program says.
    pub(super) migration: Trial,
    /// Whoever waits at the listener it goes to is woken.
    pub(super) wake_up: Trial,
    /// A classic program chooses the slot it names.
    pub(super) slot: Trial,
    /// The kernel's list shows a group in `listen()` order.
    pub(super) order: Trial,
    pub(super) orphan: Orphan,
}

const NOT_WOKEN: &str = "a connection moved to a listener, and who waited there was not woken";

impl Trials {
    /// Runs all; each takes milliseconds, and seconds only where the kernel fails it.
    pub(super) fn run() -> Trials {
        match scratch::is_usable() {
            Ok(()) => Trials::try_all(),
            Err(trouble) => Trials::none(trouble.into()),
        }
    }

    fn none(obstacle: Obstacle) -> Trials {
        let untested = || Trial::Untested(obstacle.clone());
        Trials {
            steering: untested(),
            migration: untested(),
            wake_up: untested(),
            slot: untested(),
            order: order::listen_order().into(),
            orphan: Orphan::Untested(obstacle.clone()),
        }
    }

    fn try_all() -> Trials {
        let woken = |is_woken| if is_woken { Trial::Passed } else { Trial::Failed(NOT_WOKEN.to_owned()) };
        let moved = ebpf::migration();
        let (orphan, orphan_woken) = match migrate::orphan() {
            Ok(Fate::Moved { is_woken }) => (Orphan::Moved, Some(is_woken)),
            Ok(Fate::Reset) => (Orphan::Reset, None),
            Err(trouble) => (Orphan::Untested(trouble.into()), None),
        };
        Trials {
            steering: ebpf::steering().into(),
            wake_up: match (&moved, orphan_woken) {
                (Ok(is_woken), _) => woken(*is_woken),
                // The same wake-up, had without the program.
                (Err(_), Some(is_woken)) => woken(is_woken),
                (Err(Trouble::Failed(why)), None) => {
                    Trial::Untested(Obstacle { why: why.clone(), remedy: AGAIN })
                }
                (Err(Trouble::Untested(obstacle)), None) => Trial::Untested(obstacle.clone()),
            },
            migration: moved.map(drop).into(),
            slot: cbpf::slot().into(),
            order: order::listen_order().into(),
            orphan,
        }
    }
}

/// Fetches a descriptor from a child of our own, as from an unmodified worker.
pub(super) fn getfd() -> Trial {
    // It lives until its input ends.
    let child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            // No child, then at least whether the call is let through.
            if let Err(refused) = fetch(std::process::id()) {
                return Trial::Failed(refused);
            }
            let why = format!("cannot start cat as a child to try it on: {error}");
            return Trial::Untested(Obstacle {
                why,
                remedy: "reuseportd doctor   # again, with cat in PATH",
            });
        }
    };
    let fetched = fetch(child.id());
    // A cat that is none might not end with its input.
    let _ = child.kill().and_then(|()| child.wait());
    fetched.map_or_else(Trial::Failed, |()| Trial::Passed)
}

fn fetch(pid: u32) -> Result<(), String> {
    let fetched =
        pidfd::open(pid.cast_signed()).and_then(|process| pidfd::getfd(process.as_fd(), 0).map(drop));
    fetched.map_err(|error| error.to_string())
}
