"""A terminal of so many columns, as far as a progress bar needs one: what stands on it after some bytes."""

import re

_TOKEN = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|\x1b\][^\x07]*\x07|([\r\n\x08\x07])|([^\x1b\r\n\x08\x07]+)")


class Terminal:
    """Printable text, line ends, cursor up and down, erasing; colours and modes are passed over."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines = [""]
        self.row = self.column = 0

    def feed(self, text: str) -> "Terminal":
        """Write `text`; returns the terminal."""
        for match in _TOKEN.finditer(text):
            arguments, command, control, printable = match.groups()
            if command is not None:
                self._command(command, arguments)
            elif control is not None:
                self._control(control)
            elif printable is not None:
                for character in printable:
                    self._put(character)
        return self

    def _command(self, command: str, arguments: str) -> None:
        count = int(arguments) if arguments.isdigit() else 1
        if command == "A":
            self.row = max(0, self.row - count)
        elif command == "B":
            self._go_to(self.row + count)
        elif command == "K":
            line = self.lines[self.row]
            self.lines[self.row] = "" if arguments == "2" else line[: self.column]
        elif command == "J":
            self.lines[self.row] = self.lines[self.row][: self.column]
            del self.lines[self.row + 1 :]

    def _control(self, control: str) -> None:
        if control == "\n":
            self._go_to(self.row + 1)
        elif control == "\r":
            self.column = 0
        elif control == "\x08":
            self.column = max(0, self.column - 1)

    def _put(self, character: str) -> None:
        if self.column == self.columns:
            self._go_to(self.row + 1)
            self.column = 0
        line = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
        self.column += 1

    def _go_to(self, row: int) -> None:
        self.row = row
        self.lines += [""] * (row + 1 - len(self.lines))

    def shown(self) -> list[str]:
        """The lines that are not empty."""
        return [line.rstrip() for line in self.lines if line.strip()]
