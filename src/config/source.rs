//! The file as text: opened without hanging, bounded, UTF-8.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::diagnose::ConfigErrors;
use super::problems::{FILE_START, Problems};

/// Nobody writes a config or environment file larger than this; a path to something else is the likelier story.
const BYTES_MAX: u64 = 1 << 20;

/// Reads the whole file.
pub(super) fn read(path: &Path) -> Result<String, ConfigErrors> {
    let refuse = |text: &str, span, message: &str, help: &str| {
        let mut problems = Problems::default();
        problems.add("", span, message, help);
        Err(ConfigErrors::new(path, text, problems))
    };
    let bytes = match read_bytes(path) {
        Ok(bytes) => bytes,
        Err(error) => return refuse("", None, &format!("cannot read the file: {error}"), remedy(&error)),
    };
    match String::from_utf8(bytes) {
        Ok(text) if text.trim().is_empty() => refuse("", Some(FILE_START), "the file is empty", SMALLEST),
        Ok(text) => Ok(text),
        Err(error) => {
            let end = error.utf8_error().valid_up_to();
            let before = String::from_utf8_lossy(&error.as_bytes()[..end]);
            refuse(&before, Some(end..end), "not UTF-8 from here on", "save the file with UTF-8 encoding")
        }
    }
}

const SMALLEST: &str = "the smallest config that works:\n\
    [app]\ncommand = [\"/path/to/program\"]\n[[listen]]\naddress = \"0.0.0.0:8080\"";

/// The bytes of a file that people write, and no more than those have.
pub(super) fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    // A FIFO without a writer would otherwise hang the master, which reads its config again at SIGHUP.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !kind.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 1 MiB"));
    }
    Ok(bytes)
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "check the path after --config",
        io::ErrorKind::PermissionDenied => "let the user that runs reuseportd read it (ls -l, chmod)",
        io::ErrorKind::IsADirectory => "name the file itself after --config",
        io::ErrorKind::FileTooLarge => "is this the config file? its path follows --config",
        _ => "",
    }
}
