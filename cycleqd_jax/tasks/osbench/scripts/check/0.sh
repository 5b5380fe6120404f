while IFS='|' read -r expression expected; do
  found=$(calc "$expression") || exit 1
  awk -v found="$found" -v expected="$expected" '
    BEGIN {
      if (found !~ /^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$/) exit 1
      difference = found - expected
      exit !(difference < 1e-5 && difference > -1e-5)
    }' || exit 1
done << 'END'
1 + 1|2
7 - 12|-5
6 * 7|42
9 / 4|2.25
6 * (9 / 3) + 7|25
2 * (9 / 3)|6
2 * 1|2
(1 + 2) * (3 + 4)|21
100 / 8 / 5|2.5
10 - 4 - 3|3
1 / 3|0.3333333333
((2))|2
2 * (3 + 4 * (5 - 1))|38
0.5 * 0.25|0.125
END
