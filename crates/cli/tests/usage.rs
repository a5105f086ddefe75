//! Wrong arguments and what is said to them: `tests/cmd/*.toml`.

#[test]
fn wrong_arguments_are_refused_with_the_right_ones() {
    trycmd::TestCases::new().case("tests/cmd/*.toml");
}
