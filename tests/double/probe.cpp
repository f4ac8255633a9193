// Links or does not: see Compiler::links in tests/support/toolchain.rs.
int main() {}
