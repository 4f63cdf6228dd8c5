//! Where the control socket of an app is: `control.socket`, or the place that follows from who runs it.

use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::DeTable;

use super::diagnose::ConfigErrors;
use super::problems::Problems;
use super::values::{parse_name, parse_path};

/// `sockaddr_un.sun_path` holds 108 bytes, the last of them NUL. Others are beside it: `.notify` and `.keeper`.
const PATH_BYTES_MAX: usize = 107 - ".notify".len();

/// From `control.socket` as written, or the default for this app.
pub(super) fn resolve(written: &Option<Spanned<String>>, app: &str, problems: &mut Problems) -> PathBuf {
    let path = match written {
        Some(text) => problems.text("control.socket", text, parse_path).unwrap_or_default(),
        None => default_directory(app).join("control.sock"),
    };
    if path.as_os_str().len() > PATH_BYTES_MAX {
        let message = format!("{} is longer than the {PATH_BYTES_MAX} bytes it may have", path.display());
        problems.add(
            "control.socket",
            written.as_ref().map(Spanned::span),
            message,
            "set control.socket to a shorter path",
        );
    }
    path
}

/// `app.name` when absent: the file's stem, where it has the form of a name.
pub(super) fn default_name(path: &Path) -> Result<String, String> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    parse_name(&stem).map_err(|refused| format!("missing, and the file's own name does not serve: {refused}"))
}

/// The two keys that matter, out of a file that may be broken elsewhere.
pub(super) fn from_text(path: &Path, text: &str) -> Result<PathBuf, ConfigErrors> {
    let (table, _) = DeTable::parse_recoverable(text);
    let key = |section: &str, key: &str| {
        let value = table.get_ref().get(section)?.get_ref().get(key)?;
        Some(Spanned::new(value.span(), value.get_ref().as_str()?.to_owned()))
    };
    let mut problems = Problems::default();
    let name = match (key("app", "name"), key("control", "socket")) {
        (_, Some(_)) => Some(String::new()),
        (Some(name), None) => problems.text("app.name", &name, parse_name),
        (None, None) => default_name(path)
            .map_err(|said| problems.add("app.name", None, said, "set app.name or control.socket"))
            .ok(),
    };
    let socket = resolve(&key("control", "socket"), &name.unwrap_or_default(), &mut problems);
    if problems.is_empty() { Ok(socket) } else { Err(ConfigErrors::new(path, text, problems)) }
}

/// The directory in /tmp of this user, who has no other.
pub(crate) fn own_directory_name() -> String {
    format!("reuseportd-{}", nix::unistd::geteuid())
}

/// The directory of the socket. Without `XDG_RUNTIME_DIR` (su, cron, a bare container) an ordinary user gets a
/// directory of its own in /tmp; whoever creates it checks the owner.
fn default_directory(app: &str) -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(systemd) = runtime_directory() {
        return systemd;
    }
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        return Path::new("/run/reuseportd").join(app);
    }
    match variable("XDG_RUNTIME_DIR") {
        Some(directory) => Path::new(&directory).join("reuseportd").join(app),
        None => Path::new("/tmp").join(own_directory_name()).join(app),
    }
}

/// `$RUNTIME_DIRECTORY` of the systemd unit; the first, when the unit has several.
pub(crate) fn runtime_directory() -> Option<PathBuf> {
    let value = std::env::var("RUNTIME_DIRECTORY").ok()?;
    value.split(':').next().filter(|first| !first.is_empty()).map(PathBuf::from)
}
