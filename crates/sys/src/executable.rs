//! A program pinned by descriptor, so that respawns and rollbacks exec the very file that was proven.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags, Stat};

/// What tells one file from another, and one content from a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileIdentity {
    /// Device.
    pub dev: u64,
    /// Inode.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Last change of content or metadata: seconds and nanoseconds.
    pub ctime: (i64, i64),
    /// Last change of content: seconds and nanoseconds.
    pub mtime: (i64, i64),
}

impl FileIdentity {
    fn of(stat: &Stat) -> FileIdentity {
        FileIdentity {
            dev: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size.cast_unsigned(),
            ctime: (stat.st_ctime, nanoseconds(stat.st_ctime_nsec)),
            mtime: (stat.st_mtime, nanoseconds(stat.st_mtime_nsec)),
        }
    }
}

/// rustix's two ways to the kernel (under Miri it goes by the C library) differ in the type. It always fits.
fn nanoseconds(part: impl TryInto<i64>) -> i64 {
    part.try_into().unwrap_or_default()
}

/// An executable, held open.
#[derive(Debug)]
pub struct PinnedExecutable {
    path: CString,
    file: OwnedFd,
    identity: FileIdentity,
    is_script: bool,
}

impl PinnedExecutable {
    /// Opens and checks a program.
    ///
    /// # Errors
    /// ENOENT when it isn't there, EACCES when it isn't a regular file this process may execute.
    pub fn open(path: &Path) -> io::Result<PinnedExecutable> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        rustix::fs::accessat(CWD, &name, Access::EXEC_OK, AtFlags::EACCESS)?;
        // A program may be executable without being readable; then its first bytes stay unknown.
        let read_only = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::open(&name, read_only, Mode::empty())
            .or_else(|_| rustix::fs::open(&name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()))?;
        let stat = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(io::Error::from_raw_os_error(libc::EACCES));
        }
        let mut magic = [0; 2];
        let is_script = rustix::io::pread(&file, &mut magic, 0) == Ok(2) && &magic == b"#!";
        Ok(PinnedExecutable { path: name, file, identity: FileIdentity::of(&stat), is_script })
    }

    /// Takes over a descriptor that was carried through exec, with what was known of it. The identity is the one
    /// from when the file was opened: replacing the file at the path changes the held one's ctime.
    ///
    /// # Errors
    /// When the path has a NUL byte.
    pub fn from_fd(
        path: &Path,
        file: OwnedFd,
        identity: FileIdentity,
        is_script: bool,
    ) -> io::Result<PinnedExecutable> {
        Ok(PinnedExecutable { path: CString::new(path.as_os_str().as_bytes())?, file, identity, is_script })
    }

    /// Whether the path still leads to the very same content.
    #[must_use]
    pub fn is_same_at_path(&self) -> bool {
        rustix::fs::stat(&self.path).is_ok_and(|stat| FileIdentity::of(&stat) == self.identity)
    }

    /// Whether the held file has the content it had: it may have been renamed or removed, but not overwritten.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        let content = |identity: FileIdentity| (identity.size, identity.mtime);
        let now = rustix::fs::fstat(&self.file).map(|stat| FileIdentity::of(&stat));
        now.is_ok_and(|now| content(now) == content(self.identity))
    }

    /// The same file, held once more.
    ///
    /// # Errors
    /// EMFILE or ENFILE.
    pub fn try_clone(&self) -> io::Result<PinnedExecutable> {
        let (path, file) = (self.path.clone(), self.file.try_clone()?);
        Ok(PinnedExecutable { path, file, identity: self.identity, is_script: self.is_script })
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(OsStr::from_bytes(self.path.as_bytes()))
    }

    pub(crate) fn c_path(&self) -> &std::ffi::CStr {
        &self.path
    }

    /// The held file, for hashing or for handing on.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Device, inode, size and time of change when it was opened.
    #[must_use]
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// Whether it starts with `#!`. A script can't be pinned: its interpreter opens it again by path.
    #[must_use]
    pub fn is_script(&self) -> bool {
        self.is_script
    }
}
