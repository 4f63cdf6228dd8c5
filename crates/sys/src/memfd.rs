//! Snapshots in memory: a file without a name that nobody can change any more.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, memfd_create};
use rustix::io::{Errno, pread};

/// Bytes [`read`] takes at most.
const BYTES_MAX: u64 = 64 * 1024 * 1024;

/// A file in memory with these bytes, close-on-exec, sealed against every change, and the lifting of the seals.
/// The name shows up in `/proc/PID/fd`.
///
/// # Errors
/// When the name has a NUL byte or more than 249 bytes, or memory or descriptors run out.
pub fn sealed(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = open(name)?;
    file.write_all(bytes)?;
    seal(file)
}

/// An empty file in memory, close-on-exec, to be [sealed](seal) when it is written.
///
/// # Errors
/// As of [`sealed`].
pub fn open(name: &str) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    Ok(match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3 knows nothing of it; later ones can be set up to refuse anything else.
        Err(Errno::INVAL) => memfd_create(name, flags)?.into(),
        result => result?.into(),
    })
}

/// From now on nobody can change the file, or lift the seals. It is read from its start.
///
/// # Errors
/// `PermissionDenied` of one that is sealed already.
pub fn seal(mut file: File) -> io::Result<OwnedFd> {
    file.rewind()?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file.into())
}

/// The whole content of a file, from its start, wherever its position is.
///
/// # Errors
/// `FileTooLarge` above 64 MiB, `UnexpectedEof` when it shrinks meanwhile (a sealed one can't).
pub fn read(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let size = u64::try_from(fstat(fd)?.st_size).unwrap_or(0);
    if size > BYTES_MAX {
        let message = format!("a file in memory of {size} bytes; at most {BYTES_MAX} are read");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    let mut bytes = vec![0; usize::try_from(size).map_err(io::Error::other)?];
    let mut at = 0;
    while at < bytes.len() {
        match pread(fd.as_fd(), &mut bytes[at..], at as u64)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => at += count,
        }
    }
    Ok(bytes)
}

// Miri has no memfd.
#[cfg(test)]
#[cfg(not(miri))]
mod tests {
    use super::*;
    use rustix::fs::{SeekFrom, ftruncate, seek};
    use rustix::io::pwrite;

    #[test]
    fn what_was_sealed_is_read_and_can_not_be_changed() {
        let content: Vec<u8> = (0..300_000_u32).flat_map(u32::to_ne_bytes).collect();
        let file = sealed("snapshot", &content).unwrap();
        seek(&file, SeekFrom::End(0)).unwrap();
        for _ in 0..2 {
            assert_eq!(read(file.as_fd()).unwrap(), content);
        }
        assert_eq!(pwrite(&file, b"!", 0), Err(Errno::PERM));
        assert_eq!(ftruncate(&file, 0), Err(Errno::PERM));
        assert_eq!(ftruncate(&file, 2_000_000), Err(Errno::PERM));
        assert_eq!(fcntl_add_seals(&file, SealFlags::FUTURE_WRITE), Err(Errno::PERM));
        assert!(rustix::io::fcntl_getfd(&file).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        assert_eq!(read(sealed("empty", b"").unwrap().as_fd()).unwrap(), b"");
    }

    #[test]
    fn what_is_too_large_is_refused_before_memory_is_taken() {
        let file = memfd_create("large", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, BYTES_MAX + 1).unwrap();
        assert_eq!(read(file.as_fd()).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        ftruncate(&file, BYTES_MAX).unwrap();
        assert_eq!(read(file.as_fd()).unwrap().len() as u64, BYTES_MAX);
        assert!(sealed("a\0b", b"").is_err());
    }
}
