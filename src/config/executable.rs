//! Which file `app.command[0]` means, and `upgrade.check[0]`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rustix::fs::Access;

use super::{App, Config};

/// Where a bare name is looked for when nobody sets `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why the program can't be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecutableError {
    #[error("{program:?} is in no directory of PATH ({path}){hint}")]
    NotInPath { program: String, path: String, hint: &'static str },
    #[error("{}: {cause}{hint}", path.display())]
    Unusable { path: PathBuf, cause: String, hint: &'static str },
}

/// Finds the program. A bare name is searched in `PATH` (of `variables`, else of the master); a name with a slash is
/// taken from `app.working_directory`, or from the master's current directory.
///
/// # Errors
/// There is no such file, or it is not an executable one.
pub(crate) fn find_executable(
    app: &App,
    variables: &BTreeMap<String, String>,
) -> Result<PathBuf, ExecutableError> {
    find(app, app.command.first().map_or("", String::as_str), variables)
}

/// Finds the program of `upgrade.check` in the same way; `None` without a check.
///
/// # Errors
/// There is no such file, or it is not one the workers' user can execute.
pub(crate) fn find_check(
    config: &Config,
    variables: &BTreeMap<String, String>,
) -> Result<Option<PathBuf>, ExecutableError> {
    config.upgrade.check.first().map(|program| find(&config.app, program, variables)).transpose()
}

fn find(app: &App, program: &str, variables: &BTreeMap<String, String>) -> Result<PathBuf, ExecutableError> {
    let hint = if program.contains(' ') {
        "; each word of a command is a string of its own: there is no shell"
    } else {
        ""
    };
    if program.contains('/') {
        let base = app.working_directory.as_deref().unwrap_or(Path::new(""));
        let unusable = |path: PathBuf, cause| ExecutableError::Unusable { path, cause, hint };
        let path = base.join(program);
        let path = std::path::absolute(&path).map_err(|error| unusable(path, error.to_string()))?;
        return match usable(app, &path) {
            Ok(()) => Ok(path),
            Err(cause) => Err(unusable(path, cause)),
        };
    }
    let path = variables.get("PATH").cloned().or_else(|| std::env::var("PATH").ok());
    let path = path.unwrap_or_else(|| DEFAULT_PATH.to_owned());
    // Like execvp, an entry that is no directory is passed over; unlike it, an empty one is not the current directory.
    let mut candidates =
        path.split(':').filter(|entry| entry.starts_with('/')).map(|entry| Path::new(entry).join(program));
    match candidates.find(|candidate| usable(app, candidate).is_ok()) {
        Some(found) => Ok(found),
        None => Err(ExecutableError::NotInPath { program: program.to_owned(), path, hint }),
    }
}

fn usable(app: &App, path: &Path) -> Result<(), String> {
    let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("not a regular file".to_owned());
    }
    // The effective uid counts at exec, and the kernel's answer includes ACLs and noexec mounts.
    app.access(path, Access::EXEC_OK).map_err(|error| match app.identity.is_another() {
        true => format!(
            "the workers' user can't execute it: {error} (chmod +x, also on the directories above it)"
        ),
        false => "not executable by this user (chmod +x, or a noexec mount)".to_owned(),
    })
}
