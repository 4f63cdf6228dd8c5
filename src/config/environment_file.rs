//! `app.environment_file`: lines of `KEY=VALUE`, read the way systemd reads its `EnvironmentFile=`.
//!
//! Empty lines and lines that begin with `#` or `;` are skipped. Blanks around a value are dropped. In `'…'` all stands
//! for itself, in `"…"` a backslash guards `"` `\` `` ` `` `$`, elsewhere any character. A value ends with its line.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::App;
use super::source::read_bytes;

/// Why an environment file can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnvironmentFileError {
    #[error("environment file {}: cannot read it: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("environment file {}, line {line}: {what}", path.display())]
    Line { path: PathBuf, line: usize, what: &'static str },
}

impl App {
    /// The variables the config gives to each worker: `environment`, then `environment_file`, which wins (as with
    /// systemd). Reads the file anew.
    ///
    /// # Errors
    /// The file can't be read, or a line of it is malformed.
    pub(crate) fn variables(&self) -> Result<BTreeMap<String, String>, EnvironmentFileError> {
        let mut variables = self.environment.clone();
        if let Some(path) = &self.environment_file {
            variables.extend(read_environment_file(path)?);
        }
        Ok(variables)
    }
}

/// Reads the file.
///
/// # Errors
/// It can't be read, or a line is malformed.
fn read_environment_file(path: &Path) -> Result<BTreeMap<String, String>, EnvironmentFileError> {
    let bytes =
        read_bytes(path).map_err(|source| EnvironmentFileError::Read { path: path.to_owned(), source })?;
    let mut variables = BTreeMap::new();
    for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let parsed = std::str::from_utf8(line).map_err(|_| "not UTF-8").and_then(parse_line);
        match parsed {
            Ok(Some((name, value))) => drop(variables.insert(name, value)),
            Ok(None) => {}
            Err(what) => {
                return Err(EnvironmentFileError::Line { path: path.to_owned(), line: index + 1, what });
            }
        }
    }
    Ok(variables)
}

fn parse_line(line: &str) -> Result<Option<(String, String)>, &'static str> {
    let line = line.trim();
    if line.is_empty() || line.starts_with(['#', ';']) {
        return Ok(None);
    }
    let (name, value) = line.split_once('=').ok_or("no '=': write KEY=VALUE")?;
    check_variable(name.trim_end(), value)?;
    Ok(Some((name.trim_end().to_owned(), unquote(value.trim_start())?)))
}

/// Refuses what `execve` can't carry, and names that are the master's to set.
pub(super) fn check_variable(name: &str, value: &str) -> Result<(), &'static str> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if name.is_empty() || !name.bytes().all(good) || name.starts_with(|first: char| first.is_ascii_digit()) {
        return Err("not the name of a variable: use letters, digits and _ (no \"export\", no blanks)");
    }
    if value.contains('\0') {
        return Err("the value contains a NUL character");
    }
    let own = ["REUSEPORTD_", "WATCHDOG_", "LISTEN_", "SERVER_STARTER_"];
    if name == "NOTIFY_SOCKET" || own.iter().any(|prefix| name.starts_with(prefix)) {
        return Err("this variable is set by reuseportd for each worker");
    }
    Ok(())
}

fn unquote(value: &str) -> Result<String, &'static str> {
    let mut plain = String::new();
    let mut quote = None;
    let mut characters = value.chars();
    while let Some(character) = characters.next() {
        match (quote, character) {
            (None, '\'' | '"') => quote = Some(character),
            (Some(open), character) if open == character => quote = None,
            (None, '\\') => plain.push(characters.next().ok_or("ends with a backslash")?),
            (Some('"'), '\\') => match characters.next() {
                Some(guarded @ ('"' | '\\' | '`' | '$')) => plain.push(guarded),
                Some(other) => plain.extend(['\\', other]),
                None => return Err("a quote is not closed"),
            },
            (_, character) => plain.push(character),
        }
    }
    if quote.is_some() { Err("a quote is not closed") } else { Ok(plain) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Result<Option<(String, String)>, &'static str> {
        parse_line(text)
    }

    #[test]
    fn values_are_unquoted_like_systemd_does() {
        for (written, value) in [
            ("A=b", "b"),
            ("  A = b c  ", "b c"),
            ("A=", ""),
            ("A='x # y'", "x # y"),
            (r#"A="say \"hi\" \$HOME \n""#, r#"say "hi" $HOME \n"#),
            (r"A='a\b'", r"a\b"),
            (r"A=a\ b", "a b"),
            (r#"A=one"two"'three'"#, "onetwothree"),
            ("A=x=y", "x=y"),
        ] {
            assert_eq!(line(written), Ok(Some(("A".into(), value.into()))), "{written}");
        }
    }

    #[test]
    fn comments_are_skipped_and_slips_refused() {
        for skipped in ["", "  ", "# A=b", "; A=b"] {
            assert_eq!(line(skipped), Ok(None));
        }
        for wrong in ["A", "export A=b", "=b", "1A=b", "A='b", "A=\"b\\", "A=b\\", "NOTIFY_SOCKET=x", "A=\0"]
        {
            assert!(line(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_line_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "A=1\n# fine\nB\n").unwrap();
        let error = read_environment_file(file.path()).unwrap_err().to_string();
        assert!(error.contains("line 3: no '='"), "{error}");
    }
}
