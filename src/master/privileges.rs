//! Which capabilities a master keeps. Once it is set up it gives up those it has no use for, and those alone: whatever
//! its config may come to say is still to be possible, but for what [`Shell::check_privileges`] refuses.

use reuseportd_sys::capability;
use rustix::process::geteuid;
use rustix::thread::{CapabilitySet, capabilities, no_new_privs};

use super::Shell;
use crate::config::{self, App, capability_names};

/// What a master uses.
const USED: [CapabilitySet; 13] = [
    // The ebpf engine, and the program of force_reuseport.
    CapabilitySet::BPF,
    // The latter is one of the network's; TCP_REPAIR in a takeover.
    CapabilitySet::NET_ADMIN,
    // bind = "master", app.capabilities.
    CapabilitySet::NET_BIND_SERVICE,
    // app.user and app.group; what belongs to those users is made as them.
    CapabilitySet::SETUID,
    CapabilitySet::SETGID,
    // Such workers' bounding set.
    CapabilitySet::SETPCAP,
    // Ending them.
    CapabilitySet::KILL,
    // Their listeners: /proc and pidfd_getfd.
    CapabilitySet::SYS_PTRACE,
    // Files of unix sockets for them, in directories that are not theirs.
    CapabilitySet::CHOWN,
    CapabilitySet::FOWNER,
    // Everything a path in the config leads to.
    CapabilitySet::DAC_OVERRIDE,
    CapabilitySet::DAC_READ_SEARCH,
    // app.limits above the own ones; more processes and descriptors under way than a user may have.
    CapabilitySet::SYS_RESOURCE,
];

/// Of these it uses so many: CAP_SYS_ADMIN alone does what two others are made for.
fn used(own: CapabilitySet) -> CapabilitySet {
    let stands_in = !own.contains(CapabilitySet::BPF | CapabilitySet::NET_ADMIN);
    let further = if stands_in { CapabilitySet::SYS_ADMIN } else { CapabilitySet::empty() };
    USED.into_iter().collect::<CapabilitySet>() | further
}

/// What these workers get from their master, which must have it until then. Without app.user they are what it is, and
/// those of root have all that it has: under no_new_privileges a program gets no more than its parent could use, root's
/// neither.
fn given(app: &App) -> CapabilitySet {
    let asked = app.identity.capabilities;
    match app.identity.uid {
        Some(_) => asked,
        None if geteuid().is_root() => capability::ALL,
        None => asked | capability::passed_on().unwrap_or(capability::ALL),
    }
}

impl Shell {
    /// Gives up what neither this master nor the workers it starts have a use for. The file counts as well as the
    /// configs in force: after a re-exec, for which root gets everything back, an upgrade to it is possible.
    pub(super) fn give_up_privileges(&mut self) {
        let Ok(own) = capabilities(None) else { return };
        let file = config::load(&self.config_path).ok();
        let launches = self.launches.values().chain(&self.prepared).map(|launch| &*launch.config);
        let configs = launches.chain([&*self.config]).chain(&file);
        let used = used(own.permitted);
        let kept = configs.fold(used, |kept, config| kept | given(&config.app));
        // Without this capability only a process that can do no more than this one can be looked into.
        let is_open = own.effective.contains(CapabilitySet::SYS_PTRACE);
        match capability::keep(kept, if is_open { used } else { kept }) {
            Ok(dropped) if dropped.is_empty() => {}
            Ok(dropped) => {
                let (kept, names) = (capability_names(own.permitted & kept), capability_names(dropped));
                tracing::debug!(
                    event = "privileges",
                    kept,
                    dropped = names,
                    "capabilities given up: {names}"
                );
                self.dropped = dropped;
            }
            Err(error) => tracing::warn!(%error, "cannot give up capabilities"),
        }
    }

    /// Whether workers of this config could have what they are to have.
    ///
    /// # Errors
    /// The reason and the remedy, in words.
    pub(super) fn check_privileges(&self, app: &App) -> Result<(), String> {
        let lacking = given(app) & self.dropped;
        if lacking.is_empty() {
            return Ok(());
        }
        let key = if app.identity.uid.is_some() { "app.capabilities" } else { "app.user" };
        let comes_back = geteuid().is_root() && !no_new_privs().unwrap_or(true);
        let remedy = if comes_back {
            "run `reuseportd reexec`, which gets back what this file takes, and upgrade again"
        } else {
            "restart the service to change it"
        };
        Err(format!(
            "{key}: the workers would have {}, which this master gave up at its start, since nobody was to have it; {remedy}",
            capability_names(lacking)
        ))
    }
}
