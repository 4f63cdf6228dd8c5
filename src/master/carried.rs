//! Descriptors that outlive this image of the master: through an exec, or in the keeper's hands.
//!
//! What holds one derives serde like any plain data. In its text a descriptor is a name; the descriptors themselves
//! go beside it, as duplicates on the way out ([`write()`]) and by name on the way in ([`read()`]).

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use reuseportd_sys::bpf::{EbpfGroup, Flows};
use reuseportd_sys::executable::{FileIdentity, PinnedExecutable};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::keeper::{Keeper, SavedKeeper};

/// Something made of descriptors.
pub(super) trait Carry: Sized {
    /// What else there is to it.
    type Rest: Clone + Serialize + DeserializeOwned;
    /// The first part of the names of its descriptors.
    const KIND: &str = "fd";
    /// How many there are.
    const COUNT: usize = 1;

    fn parts(&self) -> (Vec<BorrowedFd<'_>>, Self::Rest);
    fn join(fds: Vec<OwnedFd>, rest: Self::Rest) -> io::Result<Self>;
}

/// One of those, under a name that no other ever had.
#[derive(Debug)]
pub(super) struct Carried<T> {
    name: u64,
    inner: T,
}

static NEXT_NAME: AtomicU64 = AtomicU64::new(1);

impl<T: Carry> Carried<T> {
    pub(super) fn new(inner: T) -> Carried<T> {
        Carried { name: NEXT_NAME.fetch_add(1, Ordering::Relaxed), inner }
    }

    pub(super) fn into_inner(self) -> T {
        self.inner
    }

    /// The names of its descriptors.
    pub(super) fn names(&self) -> impl Iterator<Item = String> {
        names::<T>(self.name)
    }
}

fn names<T: Carry>(name: u64) -> impl Iterator<Item = String> {
    (0..T::COUNT).map(move |index| format!("{}/{name}.{index}", T::KIND))
}

impl<T> Deref for Carried<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for Carried<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

/// Its text.
#[derive(Serialize, Deserialize)]
struct Entry<R> {
    name: u64,
    rest: R,
}

impl<T: Carry> Serialize for Carried<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (fds, rest) = self.inner.parts();
        send_off(self.names(), &fds).map_err(serde::ser::Error::custom)?;
        Entry { name: self.name, rest }.serialize(serializer)
    }
}

impl<'de, T: Carry> Deserialize<'de> for Carried<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Carried<T>, D::Error> {
        use serde::de::Error;
        let entry = Entry::deserialize(deserializer)?;
        let missing = |name| D::Error::custom(format!("the descriptor {name} is missing"));
        arrive::<T>(&entry).map_err(D::Error::custom)?.map_err(missing)
    }
}

/// For what may have been let go of since the text was written: without its descriptor it is `None`.
pub(super) mod if_held {
    use super::{Carried, Carry, Deserialize, Deserializer, Entry, Serialize, Serializer, arrive};

    pub(in super::super) fn serialize<S: Serializer, T: Carry>(
        held: &Option<Carried<T>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        held.serialize(serializer)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>, T: Carry>(
        deserializer: D,
    ) -> Result<Option<Carried<T>>, D::Error> {
        let Some(entry) = Option::<Entry<T::Rest>>::deserialize(deserializer)? else { return Ok(None) };
        Ok(arrive::<T>(&entry).map_err(serde::de::Error::custom)?.ok())
    }
}

/// What goes on beside a text that is being written or read.
enum Passage {
    /// Names that are not duplicated because they are there already; all names met; duplicates.
    Out(BTreeSet<String>, BTreeSet<String>, BTreeMap<String, OwnedFd>),
    In(BTreeMap<String, OwnedFd>),
    /// Only whether the text is understood: every descriptor is a dummy.
    Dry,
}

thread_local! {
    static PASSAGE: RefCell<Option<Passage>> = const { RefCell::new(None) };
}

fn send_off(names: impl Iterator<Item = String>, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    PASSAGE.with_borrow_mut(|passage| {
        let Some(Passage::Out(there, all, duplicates)) = passage else { return Ok(()) };
        for (name, fd) in names.zip(fds) {
            if !there.contains(&name) {
                duplicates.insert(name.clone(), fd.try_clone_to_owned()?);
            }
            all.insert(name);
        }
        Ok(())
    })
}

/// The thing of an entry, or the name of a descriptor that is not there.
fn arrive<T: Carry>(entry: &Entry<T::Rest>) -> io::Result<Result<Carried<T>, String>> {
    NEXT_NAME.fetch_max(entry.name.saturating_add(1), Ordering::Relaxed);
    let mut fds = Vec::new();
    for name in names::<T>(entry.name) {
        let fd = PASSAGE.with_borrow_mut(|passage| match passage {
            Some(Passage::In(fds)) => Ok(fds.remove(&name)),
            Some(Passage::Dry) => File::open("/dev/null").map(|file| Some(file.into())),
            Some(Passage::Out(..)) | None => Ok(None),
        })?;
        match fd {
            Some(fd) => fds.push(fd),
            None => return Ok(Err(name)),
        }
    }
    Ok(Ok(Carried { name: entry.name, inner: T::join(fds, entry.rest.clone())? }))
}

/// The descriptors that a text names.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// Every name in it.
    pub(super) names: BTreeSet<String>,
    /// Duplicates of those that were not there already.
    pub(super) fds: BTreeMap<String, OwnedFd>,
}

/// Writes a value down, at the end of this; descriptors under these names are not duplicated, since whoever gets the text has them.
pub(super) fn write<T: Serialize>(
    to: &mut impl io::Write,
    value: &T,
    there: BTreeSet<String>,
) -> Result<Written, serde_json::Error> {
    PASSAGE.set(Some(Passage::Out(there, BTreeSet::new(), BTreeMap::new())));
    let done = serde_json::to_writer(to, value);
    match (done, PASSAGE.take()) {
        (Ok(()), Some(Passage::Out(_, names, fds))) => Ok(Written { names, fds }),
        (done, _) => done.map(|()| Written::default()),
    }
}

/// Reads a value and takes its descriptors out of these. Without any it is only tried whether the text is understood.
pub(super) fn read<T: DeserializeOwned>(
    text: &[u8],
    fds: Option<&mut BTreeMap<String, OwnedFd>>,
) -> Result<T, serde_json::Error> {
    match fds {
        None => {
            PASSAGE.set(Some(Passage::Dry));
            let value = serde_json::from_slice(text);
            PASSAGE.set(None);
            value
        }
        Some(fds) => {
            PASSAGE.set(Some(Passage::In(std::mem::take(fds))));
            let value = serde_json::from_slice(text);
            if let Some(Passage::In(rest)) = PASSAGE.take() {
                *fds = rest;
            }
            value
        }
    }
}

fn only<T: From<OwnedFd>>(fds: Vec<OwnedFd>) -> io::Result<T> {
    fds.into_iter().next().map(T::from).ok_or_else(|| io::ErrorKind::NotFound.into())
}

macro_rules! single {
    ($kind:literal: $($type:ty),*) => {$(
        impl Carry for $type {
            type Rest = ();
            const KIND: &str = $kind;

            fn parts(&self) -> (Vec<BorrowedFd<'_>>, ()) {
                (vec![self.as_fd()], ())
            }

            fn join(fds: Vec<OwnedFd>, (): ()) -> io::Result<$type> {
                only(fds)
            }
        }
    )*};
}

/// What the keeper does more with than to hold it, it knows by name.
macro_rules! named {
    ($kind:literal: $(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub(super) struct $name(OwnedFd);

        impl From<OwnedFd> for $name {
            fn from(fd: OwnedFd) -> $name {
                $name(fd)
            }
        }

        impl AsFd for $name {
            fn as_fd(&self) -> BorrowedFd<'_> {
                self.0.as_fd()
            }
        }

        single!($kind: $name);
    };
}

single!("fd": OwnedFd, File, UnixStream, UnixListener, UnixDatagram);
named!("pidfd": /// A process.
    Pidfd);
named!("log": /// The reading end of what a worker prints.
    LogPipe);

impl Carry for Keeper {
    type Rest = SavedKeeper;
    const COUNT: usize = 2;

    fn parts(&self) -> (Vec<BorrowedFd<'_>>, SavedKeeper) {
        let (fds, rest) = self.parts();
        (fds.into(), rest)
    }

    fn join(fds: Vec<OwnedFd>, rest: SavedKeeper) -> io::Result<Keeper> {
        let fds: [OwnedFd; 2] = fds.try_into().map_err(|_| io::ErrorKind::NotFound)?;
        Ok(Keeper::join(fds, rest))
    }
}

impl Carry for EbpfGroup {
    type Rest = ();
    const COUNT: usize = 6;

    fn parts(&self) -> (Vec<BorrowedFd<'_>>, ()) {
        (self.fds().into(), ())
    }

    fn join(fds: Vec<OwnedFd>, (): ()) -> io::Result<EbpfGroup> {
        let fds: [OwnedFd; 6] = fds.try_into().map_err(|_| io::ErrorKind::NotFound)?;
        Ok(EbpfGroup::from_fds(fds))
    }
}

impl Carry for Flows {
    type Rest = ();
    const COUNT: usize = 2;

    fn parts(&self) -> (Vec<BorrowedFd<'_>>, ()) {
        (self.fds().into(), ())
    }

    fn join(fds: Vec<OwnedFd>, (): ()) -> io::Result<Flows> {
        let fds: [OwnedFd; 2] = fds.try_into().map_err(|_| io::ErrorKind::NotFound)?;
        Ok(Flows::from_fds(fds))
    }
}

/// What was known of a program when it was pinned.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Program {
    #[serde(with = "crate::config::saved::path")]
    path: PathBuf,
    dev: u64,
    inode: u64,
    size: u64,
    ctime: (i64, i64),
    mtime: (i64, i64),
    is_script: bool,
}

impl Carry for PinnedExecutable {
    type Rest = Program;

    fn parts(&self) -> (Vec<BorrowedFd<'_>>, Program) {
        let FileIdentity { dev, inode, size, ctime, mtime } = self.identity();
        let (path, is_script) = (self.path(), self.is_script());
        let program = Program { path, dev, inode, size, ctime, mtime, is_script };
        (vec![self.fd()], program)
    }

    fn join(fds: Vec<OwnedFd>, program: Program) -> io::Result<PinnedExecutable> {
        let Program { path, dev, inode, size, ctime, mtime, is_script } = program;
        let identity = FileIdentity { dev, inode, size, ctime, mtime };
        PinnedExecutable::from_fd(&path, only(fds)?, identity, is_script)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[derive(Debug, Serialize, Deserialize)]
    struct Table {
        needed: Carried<OwnedFd>,
        #[serde(with = "if_held")]
        spare: Option<Carried<File>>,
    }

    #[test]
    fn descriptors_go_beside_the_text() {
        let (mut reader, writer) = io::pipe().unwrap();
        let spare = File::open("/dev/null").unwrap();
        let table = Table { needed: Carried::new(writer.into()), spare: Some(Carried::new(spare)) };
        let spare_name = table.spare.as_ref().unwrap().names().next().unwrap();
        let mut text = Vec::new();
        let mut written = write(&mut text, &table, BTreeSet::new()).unwrap();
        assert_eq!((written.names.len(), written.fds.len()), (2, 2));
        assert_eq!(
            write(&mut io::sink(), &table, written.names.clone()).unwrap().fds.len(),
            0,
            "all of them are there"
        );
        drop(table);
        drop(written.fds.remove(&spare_name));
        let table: Table = read(&text, Some(&mut written.fds)).unwrap();
        assert!(table.spare.is_none(), "its descriptor is gone");
        File::from(table.needed.try_clone().unwrap()).write_all(b"carried").unwrap();
        let name = table.needed.name;
        drop(table);
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        assert_eq!(said, "carried");
        assert!(Carried::new(File::open("/dev/null").unwrap()).name > name);
        assert!(read::<Table>(&text, Some(&mut BTreeMap::new())).is_err(), "a needed one is missing");
        assert!(read::<Table>(&text, None).is_ok(), "it is understood");
    }
}
