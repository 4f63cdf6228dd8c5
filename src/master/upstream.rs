//! Telling the service manager (systemd) what the service is doing.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use reuseportd_core::Notice;
use sd_notify::NotifyState;

/// The service manager's socket, if there is one.
#[derive(Debug, Default)]
pub(super) struct Upstream(Option<UnixDatagram>);

impl Upstream {
    /// Looks for the service manager. Abstract addresses are understood, and a full socket never blocks, which is why
    /// the sending is done here and only the words come from sd-notify.
    pub(super) fn from_env() -> Upstream {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else {
            return Upstream::default();
        };
        let address = match path.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            _ => SocketAddr::from_pathname(&path),
        };
        let socket = UnixDatagram::unbound().and_then(|socket| {
            socket.set_nonblocking(true)?;
            socket.connect_addr(&address?)?;
            Ok(socket)
        });
        if let Err(error) = &socket {
            tracing::warn!(socket = %path.display(), %error, "cannot reach the service manager; going on without it");
        }
        Upstream(socket.ok())
    }

    /// How often it wants a sign of life: twice in the time it waits for one.
    pub(super) fn beat(&self) -> Option<Duration> {
        let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
        let is_for_us = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let patience = number("WATCHDOG_USEC").filter(|usec| *usec > 0 && is_for_us);
        patience.filter(|_| self.0.is_some()).map(|usec| Duration::from_micros(usec / 2))
    }

    fn send(&self, states: &[NotifyState<'_>]) {
        let Some(socket) = &self.0 else { return };
        let message: String = states.iter().map(|state| format!("{state}\n")).collect();
        if let Err(error) = socket.send(message.as_bytes()) {
            tracing::warn!(%error, "cannot tell the service manager");
        }
    }

    /// A state of the service.
    pub(super) fn notice(&self, notice: Notice) {
        match notice {
            Notice::Ready => self.send(&[NotifyState::Ready]),
            Notice::Stopping => self.send(&[NotifyState::Stopping]),
            Notice::Extend(by) => self.extend(by),
            Notice::Alive => self.send(&[NotifyState::Watchdog]),
            Notice::Reloading => match NotifyState::monotonic_usec_now() {
                Ok(now) => self.send(&[NotifyState::Reloading, now]),
                Err(error) => {
                    tracing::warn!(%error, "cannot tell the service manager that an upgrade begins")
                }
            },
        }
    }

    fn extend(&self, by: Duration) {
        // A little more than the phase may take: the answer to its end has to arrive too.
        let by = by.saturating_add(Duration::from_secs(5));
        // As text, because sd-notify's number ends at 71 minutes, and a bake may be longer.
        self.send(&[NotifyState::Custom(&format!("EXTEND_TIMEOUT_USEC={}", by.as_micros()))]);
    }

    /// The state in words, one line.
    pub(super) fn status(&self, text: &str) {
        let line = text.lines().next().unwrap_or_default();
        self.send(&[NotifyState::Status(line)]);
    }
}
