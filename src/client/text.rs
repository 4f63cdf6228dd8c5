//! Words, tables and colour for people. Nothing here prints.

use std::fmt::Write;

use jiff::Timestamp;

/// Width to stay within where what is to be said allows it.
pub(crate) const COLUMNS: usize = 80;

/// Gives colour, or does not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paint {
    pub(crate) coloured: bool,
}

/// What a colour means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Heading,
    Good,
    Notable,
    Bad,
    Dim,
}

impl Paint {
    pub(crate) fn tone(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            _ if !self.coloured => return text.to_owned(),
            Tone::Plain => return text.to_owned(),
            Tone::Heading => "1",
            Tone::Good => "32",
            Tone::Notable => "33",
            Tone::Bad => "31",
            Tone::Dim => "2",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// A cell of a [`Table`].
#[derive(Debug)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
    right: bool,
}

impl Cell {
    /// Text from the left; it is escaped.
    pub(crate) fn text(text: &str) -> Self {
        Self { text: escape(text), tone: Tone::Plain, right: false }
    }

    /// A number, from the right; what is not known is a question mark.
    pub(crate) fn number<N: ToString>(number: Option<N>) -> Self {
        Self { text: known(number), tone: Tone::Plain, right: true }
    }

    pub(crate) fn tone(self, tone: Tone) -> Self {
        Self { tone, ..self }
    }
}

/// Rows under a heading, columns as wide as they need to be. The last column is cut to fit [`COLUMNS`].
pub(crate) struct Table {
    rows: Vec<Vec<Cell>>,
}

impl Table {
    pub(crate) fn new(heading: impl IntoIterator<Item = String>) -> Self {
        let heading = heading.into_iter().map(|text| Cell::text(&text).tone(Tone::Dim)).collect();
        Self { rows: vec![heading] }
    }

    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }

    /// The lines, each after `indent` spaces.
    pub(crate) fn render(&self, indent: usize, paint: Paint) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let column = |index: usize| self.rows.iter().filter_map(move |row| row.get(index));
        let widths: Vec<usize> = (0..columns)
            .map(|index| column(index).map(|cell| cell.text.chars().count()).max().unwrap_or(0))
            .collect();
        let numbers: Vec<bool> = (0..columns).map(|index| column(index).any(|cell| cell.right)).collect();
        let mut lines = String::new();
        for row in &self.rows {
            let mut line = " ".repeat(indent);
            let mut at = indent;
            for (index, cell) in row.iter().enumerate() {
                let last = index + 1 == row.len();
                let text = if last { cut(&cell.text, COLUMNS.saturating_sub(at)) } else { cell.text.clone() };
                let padding = " ".repeat(widths[index] - text.chars().count().min(widths[index]));
                let painted = paint.tone(cell.tone, &text);
                line += &if numbers[index] { padding + &painted } else { painted + &padding };
                line += "  ";
                at += widths[index] + 2;
            }
            lines += line.trim_end();
            lines.push('\n');
        }
        lines
    }
}

/// At most `width` characters, but never fewer than a word or two.
fn cut(text: &str, width: usize) -> String {
    let width = width.max(16);
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width - 1).chain(['…']).collect()
}

/// The number, or a question mark.
pub(crate) fn known<N: ToString>(number: Option<N>) -> String {
    number.map_or_else(|| "?".to_owned(), |number| number.to_string())
}

/// `1 worker`, `2 workers`, `? workers`.
pub(crate) fn count<N: Copy + Into<u64>>(number: Option<N>, noun: &str) -> String {
    let number: Option<u64> = number.map(Into::into);
    format!("{} {noun}{}", known(number), if number == Some(1) { "" } else { "s" })
}

/// One line that can do nothing to a terminal: control characters, and those that hide or turn round text, as escapes.
pub(crate) fn escape(text: &str) -> String {
    let harmful = |c: char| {
        let invisible = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
        c.is_control() || invisible
    };
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if harmful(c) { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

/// Like [`escape`], but line breaks stay.
pub(crate) fn escape_lines(text: &str) -> String {
    text.lines().map(escape).collect::<Vec<_>>().join("\n")
}

/// JSON on one line, with what control characters it may hold unescaped (DEL and C1) escaped too.
pub(crate) fn escape_json(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    for c in line.chars() {
        if c.is_control() && c != '\n' {
            // Writing to a String can't fail.
            let _ = write!(text, "\\u{:04x}", u32::from(c));
        } else {
            text.push(c);
        }
    }
    text
}

/// Words in lines of at most [`COLUMNS`], each line after `indent` spaces; line breaks of the text stay.
pub(crate) fn wrap(text: &str, indent: usize) -> String {
    let mut lines = String::new();
    for paragraph in text.lines() {
        let mut at = 0;
        for word in escape(paragraph).split_whitespace() {
            let width = word.chars().count();
            if at > 0 && at + 1 + width > COLUMNS {
                lines.push('\n');
                at = 0;
            }
            let gap = if at == 0 { indent } else { 1 };
            // Writing to a String can't fail.
            let _ = write!(lines, "{:gap$}{word}", "");
            at += gap + width;
        }
        lines.push('\n');
    }
    lines
}

/// `all new connections`, `5.5 % of new connections`; of a share from 0 to 1.
pub(crate) fn share(share: f64) -> String {
    if share >= 1.0 {
        "all new connections".to_owned()
    } else if share <= 0.0 {
        "no new connections".to_owned()
    } else {
        format!("{} % of new connections", (share * 1_000.0).round() / 10.0)
    }
}

/// `312 µs`, `1.2 ms`, `812 ms` and on.
pub(crate) fn microseconds(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..10_000 => format!("{}.{} ms", us / 1_000, us % 1_000 / 100),
        _ => milliseconds(us / 1_000),
    }
}

/// `812 ms`, `1.2 s`, `2m 5s`.
pub(crate) fn milliseconds(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{}.{} s", ms / 1_000, ms % 1_000 / 100),
        _ => seconds(ms / 1_000),
    }
}

/// `12s`, `5m 3s`, `2h 5m`, `3d 4h`.
fn seconds(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{minutes}m {}s", seconds % 60),
        3_600..86_400 => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

/// How long ago an RFC 3339 time was; none for what is no time. A clock set back makes it 0.
pub(crate) fn since(started_at: &str, now: Timestamp) -> Option<String> {
    let started: Timestamp = started_at.parse().ok()?;
    Some(seconds(u64::try_from(now.duration_since(started).as_secs()).unwrap_or(0)))
}
