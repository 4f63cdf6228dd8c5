//! How values that serde does not know are saved in the master's snapshot: each module for `#[serde(with = "...")]`.
//!
//! Names where the kernel's numbers have some, so that a snapshot can be read by people. What is read is checked again
//! only as far as the types demand: a snapshot was written by a master that had checked it.

use std::path::PathBuf;

use nix::sys::resource::Resource;
use serde::de::{Deserializer, Error};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};

/// What is none of the known words.
fn unknown<E: Error>(what: &str, word: &str) -> E {
    E::custom(format!("{what} {word:?} is not known to this version"))
}

/// A path, which need not be UTF-8.
pub(crate) mod path {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::Path;

    use super::*;

    /// Text where it is some, the bytes elsewhere.
    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Saved {
        Text(String),
        Bytes(Vec<u8>),
    }

    pub(crate) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        let saved = match path.to_str() {
            Some(text) => Saved::Text(text.to_owned()),
            None => Saved::Bytes(path.as_os_str().as_bytes().to_vec()),
        };
        saved.serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        Ok(match Saved::deserialize(from)? {
            Saved::Text(text) => text.into(),
            Saved::Bytes(bytes) => OsString::from_vec(bytes).into(),
        })
    }
}

/// A path that may be absent.
pub(crate) mod optional_path {
    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Saved(#[serde(with = "super::path")] PathBuf);

    pub(crate) fn serialize<S: Serializer>(path: &Option<PathBuf>, to: S) -> Result<S::Ok, S::Error> {
        path.clone().map(Saved).serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
        Ok(Option::deserialize(from)?.map(|Saved(path)| path))
    }
}

/// `app.limits`, by the names of the config file.
pub(crate) mod limits {
    use super::super::values::LIMITS;
    use super::*;

    pub(crate) fn serialize<S: Serializer>(limits: &[(Resource, u64)], to: S) -> Result<S::Ok, S::Error> {
        let name = |limit: &Resource| LIMITS.iter().find(|(_, known)| known == limit).map(|(name, _)| name);
        // Only what LIMITS names can have been configured.
        to.collect_seq(limits.iter().filter_map(|(limit, value)| Some((name(limit)?, value))))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<(Resource, u64)>, D::Error> {
        let limit = |(name, value): (String, u64)| {
            let known = LIMITS.iter().find(|(known, _)| *known == name);
            known.map(|(_, limit)| (*limit, value)).ok_or_else(|| unknown("limit", &name))
        };
        Vec::deserialize(from)?.into_iter().map(limit).collect()
    }
}

/// `SIGTERM`.
pub(crate) mod signal {
    use nix::sys::signal::Signal;

    use super::*;

    pub(crate) fn serialize<S: Serializer>(signal: &Signal, to: S) -> Result<S::Ok, S::Error> {
        signal.as_str().serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Signal, D::Error> {
        let name = String::deserialize(from)?;
        name.parse().map_err(|_| unknown("signal", &name))
    }
}

/// `INFO`.
pub(crate) mod level {
    use tracing::Level;

    use super::*;

    pub(crate) fn serialize<S: Serializer>(level: &Level, to: S) -> Result<S::Ok, S::Error> {
        level.as_str().serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Level, D::Error> {
        let name = String::deserialize(from)?;
        name.parse().map_err(|_| unknown("log level", &name))
    }
}

/// Numbers, as the kernel has them: names may mean somebody else by the time they are read.
pub(crate) mod identity {
    use reuseportd_sys::identity::{Groups, Identity};
    use rustix::process::{Gid, Uid};
    use rustix::thread::CapabilitySet;

    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Saved {
        uid: Option<u32>,
        /// The primary group, and all.
        groups: Option<(u32, Vec<u32>)>,
        capabilities: u64,
    }

    pub(crate) fn serialize<S: Serializer>(identity: &Identity, to: S) -> Result<S::Ok, S::Error> {
        let all = |groups: &Groups| groups.supplementary.iter().map(|gid| gid.as_raw()).collect();
        let saved = Saved {
            uid: identity.uid.map(Uid::as_raw),
            groups: identity.groups.as_ref().map(|groups| (groups.gid.as_raw(), all(groups))),
            capabilities: identity.capabilities.bits(),
        };
        saved.serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Identity, D::Error> {
        let Saved { uid, groups, capabilities } = Saved::deserialize(from)?;
        Ok(Identity {
            uid: uid.map(Uid::from_raw),
            groups: groups.map(|(gid, all)| Groups {
                gid: Gid::from_raw(gid),
                supplementary: all.into_iter().map(Gid::from_raw).collect(),
            }),
            capabilities: CapabilitySet::from_bits_retain(capabilities),
        })
    }
}
