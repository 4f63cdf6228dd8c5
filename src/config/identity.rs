//! `app.user`, `app.group` and `app.capabilities`: whom workers run as, and whether this process can make them so.

use std::path::Path;

use nix::unistd;
use reuseportd_sys::identity::{self, Groups, Identity};
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::process::{Gid, Uid, geteuid};
use rustix::thread::CapabilitySet;
use toml::Spanned;

use super::App;
use super::problems::Problems;
use super::schema::{self, Scalar};
use super::suggest::did_you_mean;
use super::values::quoted;

/// What a login sets: those with a value, and those a user has none for.
pub(crate) type Login = Vec<(String, Option<String>)>;

/// Why this process can't start such workers.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    #[error(
        "app.{key}: starting workers of another user or group takes {missing}, which this reuseportd (uid {uid}) \
         lacks: run it as root, or leave app.{key} out and run it as that user"
    )]
    Switch { key: &'static str, missing: String, uid: u32 },
    #[error(
        "app.capabilities: this reuseportd (uid {uid}) lacks {missing} itself and can't give it to workers: run it \
         as root, or give it that capability (AmbientCapabilities= in the unit)"
    )]
    Grant { missing: String, uid: u32 },
}

/// Looks everything up, once per generation.
pub(super) fn resolve(raw: &schema::App, problems: &mut Problems) -> (Identity, Login) {
    let mut add = |key: &str, place: &Spanned<Scalar>, message, help: &str| {
        problems.add(key, Some(place.span()), message, help);
    };
    const USERS: &str = "allowed: a user name or uid of this machine";
    let user = raw.user.as_ref().and_then(|place| {
        user(place.get_ref()).map_err(|message| add("app.user", place, message, USERS)).ok()
    });
    let named = raw.group.as_ref().and_then(|place| {
        let help = "allowed: a group name or gid of this machine";
        group(place.get_ref()).map_err(|message| add("app.group", place, message, help)).ok()
    });
    // A group alone is for the user this process is.
    let account = match (&user, named) {
        (Some(user), _) => user.account.clone(),
        (None, Some(_)) => unistd::User::from_uid(unistd::Uid::effective()).ok().flatten(),
        (None, None) => None,
    };
    let gid = named.or(account.as_ref().map(|account| account.gid));
    if let (Some(place), Some(user), None, None) = (&raw.user, &user, gid, &raw.group) {
        let message = format!("uid {} has no account on this machine, so its group is unknown", user.uid);
        add("app.user", place, message, "set app.group");
    }
    let groups = gid.and_then(|gid| match supplementary(account.as_ref(), gid) {
        Ok(groups) => Some(groups),
        Err(message) => {
            let place = raw.user.as_ref().or(raw.group.as_ref())?;
            add("app.user", place, message, "is the database of users reachable (getent group)?");
            None
        }
    });
    let identity = Identity {
        uid: user.as_ref().map(|user| Uid::from_raw(user.uid.as_raw())),
        groups,
        capabilities: capabilities(raw, problems),
    };
    (identity, user.map(|user| login(user.account.as_ref())).unwrap_or_default())
}

/// A user that there is.
pub(super) struct User {
    pub(super) uid: unistd::Uid,
    /// Its entry in the database of users; a uid may have none.
    account: Option<unistd::User>,
}

/// By name, else by uid.
pub(super) fn user(written: &Scalar) -> Result<User, String> {
    let failed = |error| format!("cannot look up user {written}: {error}");
    if let Scalar::Word(name) = written
        && let Some(account) = unistd::User::from_name(name).map_err(failed)?
    {
        return Ok(User { uid: account.uid, account: Some(account) });
    }
    let uid = unistd::Uid::from_raw(number(written).ok_or_else(|| format!("there is no user {written}"))?);
    Ok(User { uid, account: unistd::User::from_uid(uid).map_err(failed)? })
}

fn group(written: &Scalar) -> Result<unistd::Gid, String> {
    let failed = |error| format!("cannot look up group {written}: {error}");
    if let Scalar::Word(name) = written
        && let Some(group) = unistd::Group::from_name(name).map_err(failed)?
    {
        return Ok(group.gid);
    }
    let gid = number(written).ok_or_else(|| format!("there is no group {written}"))?;
    Ok(unistd::Gid::from_raw(gid))
}

/// An id; the highest number means "as it is" to the kernel, and is nobody's.
fn number(written: &Scalar) -> Option<u32> {
    let number = match written {
        Scalar::Number(number) => u32::try_from(*number).ok(),
        Scalar::Word(word) => word.parse().ok(),
    };
    number.filter(|number| *number != u32::MAX)
}

/// All groups of an account, as a login would get them.
fn supplementary(account: Option<&unistd::User>, gid: unistd::Gid) -> Result<Groups, String> {
    let of = |gid: unistd::Gid| Gid::from_raw(gid.as_raw());
    let groups = match account {
        None => vec![gid],
        Some(account) => {
            let name = std::ffi::CString::new(account.name.as_str()).map_err(|error| error.to_string())?;
            unistd::getgrouplist(&name, gid)
                .map_err(|error| format!("cannot look up the groups of {}: {error}", quoted(&account.name)))?
        }
    };
    Ok(Groups { gid: of(gid), supplementary: groups.into_iter().map(of).collect() })
}

/// The same variables, and the same exceptions, as systemd: no root directory as a home, no shell that is none.
fn login(account: Option<&unistd::User>) -> Login {
    let path = |path: &Path| path.to_str().filter(|path| !path.is_empty()).map(str::to_owned);
    let name = account.map(|account| account.name.clone());
    let home = account.and_then(|account| path(&account.dir)).filter(|home| home != "/");
    let is_none = |shell: &str| ["/nologin", "/false", "/true"].iter().any(|none| shell.ends_with(none));
    let shell = account.and_then(|account| path(&account.shell)).filter(|shell| !is_none(shell));
    [("USER", name.clone()), ("LOGNAME", name), ("HOME", home), ("SHELL", shell)]
        .map(|(variable, value)| (variable.to_owned(), value))
        .into()
}

fn capabilities(raw: &schema::App, problems: &mut Problems) -> CapabilitySet {
    let mut set = CapabilitySet::empty();
    for (index, written) in raw.capabilities.iter().enumerate() {
        let upper = written.get_ref().to_ascii_uppercase();
        let name = upper.strip_prefix("CAP_").unwrap_or(&upper);
        match CapabilitySet::all().iter_names().find(|(known, _)| *known == name) {
            Some((_, one)) => set |= one,
            None => {
                let known: Vec<String> =
                    CapabilitySet::all().iter_names().map(|(name, _)| full(name)).collect();
                let hint = did_you_mean(&full(name), known.iter().map(String::as_str));
                problems.add(
                    format!("app.capabilities[{index}]"),
                    Some(written.span()),
                    format!("{} is no capability", quoted(written.get_ref())),
                    format!("{hint}allowed are names like \"CAP_NET_BIND_SERVICE\" (man 7 capabilities)"),
                );
            }
        }
    }
    set
}

fn full(name: &str) -> String {
    format!("CAP_{name}")
}

/// Of all in a set, as people write them.
pub(crate) fn capability_names(set: CapabilitySet) -> String {
    set.iter_names().map(|(name, _)| full(name)).collect::<Vec<_>>().join(", ")
}

impl App {
    /// The user all sockets of the workers belong to.
    pub(crate) fn uid(&self) -> Uid {
        self.identity.uid.unwrap_or_else(geteuid)
    }

    /// Whether this process can start workers with this identity, and end them.
    ///
    /// # Errors
    /// It lacks a capability.
    pub(crate) fn check_identity(&self) -> Result<(), IdentityError> {
        let own = rustix::thread::capabilities(None).ok();
        let effective = own.map_or(CapabilitySet::empty(), |sets| sets.effective);
        let permitted = own.map_or(CapabilitySet::empty(), |sets| sets.permitted);
        let uid = geteuid().as_raw();
        let Identity { uid: user, capabilities, .. } = &self.identity;
        let (key, needed) = match user {
            Some(_) => {
                let set = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::SETPCAP;
                ("user", set | CapabilitySet::KILL)
            }
            None if self.identity.groups.is_some() => ("group", CapabilitySet::SETGID),
            None => ("user", CapabilitySet::empty()),
        };
        let missing = needed - effective;
        if !missing.is_empty() {
            return Err(IdentityError::Switch { key, missing: capability_names(missing), uid });
        }
        let missing = *capabilities - permitted;
        if !missing.is_empty() {
            return Err(IdentityError::Grant { missing: capability_names(missing), uid });
        }
        Ok(())
    }

    /// Whether workers may use a file so, with the rights they will have.
    ///
    /// # Errors
    /// As the kernel says it: EACCES when they may not.
    pub(crate) fn access(&self, path: &Path, access: Access) -> std::io::Result<()> {
        if self.identity.is_another() {
            identity::access(&self.identity, path, access)
        } else {
            Ok(accessat(CWD, path, access, AtFlags::EACCESS)?)
        }
    }
}
