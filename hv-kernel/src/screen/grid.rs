//! What the screen shows, as characters in memory, and what of it has still to be drawn.

use core::ops::Range;

use super::{Colour, Surface};

/// The widest and the highest screen, in characters.
pub const MAX_COLUMNS: usize = 240;
pub const MAX_ROWS: usize = 80;
/// Tabulators stop at multiples of this.
const TAB: usize = 8;

/// A character on the screen. All zero is an empty one.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    /// Printable ASCII, or 0 for nothing.
    pub character: u8,
    /// Its colour.
    pub colour: Colour,
}

impl Cell {
    const EMPTY: Self = Self { character: 0, colour: Colour::Text };
}

/// The cells of a grid, row by row: what is to be shown, and what is drawn. Too large for a stack.
pub struct Cells {
    wanted: [Cell; MAX_COLUMNS * MAX_ROWS],
    drawn: [Cell; MAX_COLUMNS * MAX_ROWS],
}

impl Cells {
    /// Nothing.
    pub const EMPTY: Self = Self {
        wanted: [Cell::EMPTY; MAX_COLUMNS * MAX_ROWS],
        drawn: [Cell::EMPTY; MAX_COLUMNS * MAX_ROWS],
    };
}

/// Rows of characters, written from the top to the bottom, and then on and on at the bottom.
pub struct Grid<'a> {
    columns: usize,
    rows: usize,
    /// Where the next character goes.
    column: usize,
    row: usize,
    /// The line has ended. The next one begins with its first character, so that no empty row stays
    /// at the bottom.
    ended: bool,
    /// How many rows at the top stay where they are.
    fixed: usize,
    /// Rows that may differ from what is drawn.
    changed: Range<usize>,
    cells: &'a mut Cells,
}

impl<'a> Grid<'a> {
    /// A grid of this size in cells that are empty, for a screen that shows nothing.
    pub fn new(cells: &'a mut Cells, columns: usize, rows: usize) -> Self {
        Self {
            columns: columns.min(MAX_COLUMNS),
            rows: rows.min(MAX_ROWS),
            column: 0,
            row: 0,
            ended: false,
            fixed: 0,
            changed: 0..0,
            cells,
        }
    }

    /// Columns and rows.
    pub fn size(&self) -> (usize, usize) {
        (self.columns, self.rows)
    }

    /// The screen may show anything.
    pub fn forget_drawn(&mut self) {
        // No character that is ever wanted.
        self.cells.drawn.fill(Cell { character: u8::MAX, colour: Colour::Text });
        self.changed = 0..self.rows;
    }

    /// Puts a character behind the last one. `\n` ends a line; other control characters and what
    /// is not ASCII appear as something harmless.
    pub fn put(&mut self, colour: Colour, character: char) {
        match character {
            '\n' => self.end_line(),
            '\t' => {
                self.put_one(colour, b' ');
                while !self.column.is_multiple_of(TAB) && self.column < self.columns {
                    self.put_one(colour, b' ');
                }
            }
            ' '..='~' => self.put_one(colour, character as u8),
            c if c.is_ascii_control() => self.put_one(colour, b'.'),
            _ => self.put_one(colour, b'?'),
        }
    }

    fn put_one(&mut self, colour: Colour, character: u8) {
        if self.ended || self.column >= self.columns {
            self.begin_line();
        }
        if let Some(cell) = self.cells.wanted.get_mut(self.row * MAX_COLUMNS + self.column) {
            *cell = Cell { character, colour };
        }
        self.touch(self.row..self.row + 1);
        self.column += 1;
    }

    /// Ends the line, also one that is empty.
    pub fn end_line(&mut self) {
        if self.ended {
            self.begin_line();
        }
        self.ended = true;
    }

    fn begin_line(&mut self) {
        self.ended = false;
        self.column = 0;
        self.row += 1;
        if self.row >= self.rows {
            self.scroll();
        }
    }

    /// Makes room at the bottom, for several lines at once: all rows may have to be drawn again.
    fn scroll(&mut self) {
        let rows = self.rows.saturating_sub(self.fixed);
        let lines = (rows / 4).max(1);
        let row = |row: usize| row * MAX_COLUMNS;
        let end = row(self.rows);
        let kept = row(self.fixed + lines).min(end);
        self.cells.wanted.copy_within(kept..end, row(self.fixed));
        self.cells.wanted[row(self.rows - lines.min(self.rows))..end].fill(Cell::EMPTY);
        self.row = self.rows.saturating_sub(lines);
        self.touch(self.fixed..self.rows);
    }

    /// What follows is the first row.
    pub fn begin_title(&mut self) {
        (self.row, self.column, self.ended) = (0, 0, false);
        let colour = Colour::Title;
        self.cells.wanted[..self.columns].fill(Cell { character: 0, colour });
        self.put_one(colour, b' ');
    }

    /// What follows is below the first row, which stays.
    pub fn end_title(&mut self) {
        self.fixed = 1;
        (self.row, self.column, self.ended) = (0, 0, true);
    }

    /// Makes all rows empty but those that stay.
    pub fn clear(&mut self) {
        self.cells.wanted[self.fixed * MAX_COLUMNS..].fill(Cell::EMPTY);
        self.column = 0;
        (self.row, self.ended) = match self.fixed {
            0 => (0, false),
            fixed => (fixed - 1, true),
        };
        self.touch(0..self.rows);
    }

    fn touch(&mut self, rows: Range<usize>) {
        self.changed = if self.changed.is_empty() {
            rows
        } else {
            self.changed.start.min(rows.start)..self.changed.end.max(rows.end)
        };
    }

    /// Draws what differs from what is drawn.
    pub fn draw(&mut self, surface: &mut impl Surface) {
        for row in core::mem::take(&mut self.changed) {
            let start = row * MAX_COLUMNS;
            let cells = start..start + self.columns;
            let (Some(wanted), Some(drawn)) =
                (self.cells.wanted.get(cells.clone()), self.cells.drawn.get_mut(cells))
            else {
                return;
            };
            let mut column = 0;
            while column < wanted.len() {
                let differs = |at: usize| wanted[at] != drawn[at];
                let run = (column..wanted.len()).take_while(|at| differs(*at)).count();
                if run > 0 {
                    surface.draw(column, row, &wanted[column..column + run]);
                    drawn[column..column + run].copy_from_slice(&wanted[column..column + run]);
                }
                column += run.max(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::String;
    use std::{boxed::Box, vec, vec::Vec};

    /// Remembers what was drawn.
    struct Paper {
        rows: Vec<Vec<Cell>>,
        /// Cells drawn so far.
        cells: usize,
    }

    impl Surface for Paper {
        fn draw(&mut self, column: usize, row: usize, cells: &[Cell]) {
            self.rows[row][column..column + cells.len()].copy_from_slice(cells);
            self.cells += cells.len();
        }
    }

    struct Shown {
        grid: Grid<'static>,
        paper: Paper,
    }

    impl Shown {
        fn new(columns: usize, rows: usize) -> Self {
            let grid = Grid::new(Box::leak(Box::new(Cells::EMPTY)), columns, rows);
            let rows = vec![vec![Cell::EMPTY; columns]; rows];
            Self { grid, paper: Paper { rows, cells: 0 } }
        }

        fn line(&mut self, text: &str) {
            text.chars().for_each(|c| self.grid.put(Colour::Text, c));
            self.grid.end_line();
            self.grid.draw(&mut self.paper);
        }

        /// The rows, `_` for nothing.
        fn text(&self) -> Vec<String> {
            let shown = |cell: &Cell| match cell.character {
                0 => '_',
                character => char::from(character),
            };
            self.paper.rows.iter().map(|row| row.iter().map(shown).collect()).collect()
        }
    }

    #[test]
    fn lines_stand_below_each_other_and_long_ones_go_on_below() {
        let mut shown = Shown::new(4, 5);
        shown.line("ab");
        shown.line("cdefgh");
        shown.line("");
        shown.line("ijkl");
        assert_eq!(shown.text(), ["ab__", "cdef", "gh__", "____", "ijkl"]);
    }

    #[test]
    fn several_rows_make_room_at_once_and_the_title_stays() {
        let mut shown = Shown::new(3, 9);
        shown.grid.begin_title();
        "T".chars().for_each(|c| shown.grid.put(Colour::Title, c));
        shown.grid.end_title();
        for line in ["1", "2", "3", "4", "5", "6", "7", "8"] {
            shown.line(line);
        }
        assert_eq!(shown.text()[..3], [" T_", "1__", "2__"]);
        assert_eq!(shown.text()[8], "8__");
        shown.line("9");
        let expected = [" T_", "3__", "4__", "5__", "6__", "7__", "8__", "9__", "___"];
        assert_eq!(shown.text(), expected);
        assert_eq!(shown.paper.rows[0][2].colour, Colour::Title);
        // The next line finds room: it alone is drawn.
        let before = shown.paper.cells;
        shown.line("ab");
        assert_eq!((shown.text()[8].as_str(), shown.paper.cells - before), ("ab_", 2));
    }

    #[test]
    fn a_screen_is_full_of_lines_at_most() {
        for (columns, rows) in [(1, 1), (1, 2), (2, 3), (240, 80), (1000, 1000), (0, 0), (5, 0)] {
            let mut shown = Shown::new(columns, rows);
            for title in [false, true] {
                if title {
                    shown.grid.begin_title();
                    "a title".chars().for_each(|c| shown.grid.put(Colour::Title, c));
                    shown.grid.end_title();
                }
                for number in 0..2 * rows.min(MAX_ROWS) {
                    let before = shown.paper.cells;
                    shown.line(&std::format!("{number:>300}\t{number}"));
                    let drawn = shown.paper.cells - before;
                    assert!(drawn <= columns.min(MAX_COLUMNS) * rows.min(MAX_ROWS), "{drawn}");
                }
            }
        }
    }

    #[test]
    fn what_is_drawn_is_what_is_wanted() {
        let mut shown = Shown::new(20, 7);
        let mut seed = 1u32;
        for _ in 0..2000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let character = char::from((seed >> 24) as u8);
            shown.grid.put(Colour::ALL[(seed >> 8) as usize % Colour::COUNT], character);
            if seed & 0x1f00 == 0 {
                shown.grid.clear();
            }
            if seed & 0xf0 == 0 {
                shown.grid.draw(&mut shown.paper);
                for (row, drawn) in shown.paper.rows.iter().enumerate() {
                    assert_eq!(drawn[..], shown.grid.cells.wanted[row * MAX_COLUMNS..][..20]);
                }
            }
        }
    }

    #[test]
    fn nothing_is_obeyed_but_the_end_of_a_line() {
        let mut shown = Shown::new(20, 2);
        shown.line("a\x1b[2J\r\x08\x7f\u{9b}é\u{202e}");
        shown.line("a\tb");
        assert_eq!(shown.text(), ["a.[2J...???_________", "a       b___________"]);
    }

    #[test]
    fn a_screen_that_shows_something_is_overwritten() {
        let mut shown = Shown::new(3, 2);
        shown.grid.forget_drawn();
        shown.line("a");
        assert_eq!(shown.paper.cells, 6);
    }
}
